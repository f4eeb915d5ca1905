//! Disks that begin as images: what bringing one in costs, the first touch of each chunk, and how long it is until a disk
//! can be read, however large it is.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::{
    Pattern, WRITE,
    contender::{Contender, Disk, Served},
    fio,
};

const NAME: &str = "bench";
/// The image that is brought in and read.
const IMAGE_MB: u64 = 1024;
/// Images of which nothing but the size differs.
const SMALL_MB: u64 = 1024;
const LARGE_MB: u64 = 64 * 1024;
/// Written in single blocks, each once.
const WRITTEN_MB: u64 = 256;

const ONCE: Pattern =
    Pattern { name: "first-touch-256k", kind: "read", block: "256k", queue_depth: 4, ..WRITE };
const SCATTERED: Pattern = Pattern { name: "written", queue_depth: 32, ..WRITE };

/// Figures that aren't a turn's.
#[derive(Debug, Default, Serialize)]
pub(super) struct Figures {
    /// Bringing in an image of random bytes, raw.
    pub(super) import_s: f64,
    /// The same by `qemu-img convert` to a qcow2, and to another raw file.
    pub(super) convert_qcow2_s: f64,
    pub(super) convert_raw_s: f64,
    /// Reading a disk of that image once, from one end to the other.
    pub(super) first_touch_mib_s: f64,
    /// The same of the image's file through qemu-storage-daemon, and of the file itself.
    pub(super) daemon_mib_s: f64,
    pub(super) file_mib_s: f64,
    /// From the start of its server to the first byte of a new disk, by the size of its image.
    pub(super) start_small_ms: f64,
    pub(super) start_large_ms: f64,
    /// Space that a disk takes, over what was written to it in blocks here and there.
    pub(super) space_ratio: f64,
}

/// Takes the median of each figure.
pub(super) fn measure(godwit: &Path, directory: &Path, rounds: u32) -> Result<Figures> {
    let image = directory.join("image.raw");
    write_random(&image)?;
    let mut all = Vec::new();
    for round in 1..=rounds {
        let figures = one_round(godwit, directory, &image)?;
        eprintln!("images · round {round}: {figures:?}");
        all.push(figures);
    }
    let median = |of: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = all.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    Ok(Figures {
        import_s: median(|it| it.import_s),
        convert_qcow2_s: median(|it| it.convert_qcow2_s),
        convert_raw_s: median(|it| it.convert_raw_s),
        first_touch_mib_s: median(|it| it.first_touch_mib_s),
        daemon_mib_s: median(|it| it.daemon_mib_s),
        file_mib_s: median(|it| it.file_mib_s),
        start_small_ms: median(|it| it.start_small_ms),
        start_large_ms: median(|it| it.start_large_ms),
        space_ratio: median(|it| it.space_ratio),
    })
}

fn one_round(godwit: &Path, directory: &Path, image: &Path) -> Result<Figures> {
    let place = tempfile::tempdir_in(directory)?;
    let path = |name: &str| place.path().join(name);
    let repository = path("repository");
    let convert = |format: &str| {
        let mut command = Command::new("qemu-img");
        timed(command.args(["convert", "-f", "raw", "-O", format]).arg(image).arg(path(format)))
    };
    let mut figures = Figures {
        import_s: import(godwit, &repository, image, NAME)?.as_secs_f64(),
        convert_qcow2_s: convert("qcow2")?.as_secs_f64(),
        convert_raw_s: convert("raw")?.as_secs_f64(),
        ..Figures::default()
    };
    let read = |disk: &Disk| {
        nix::unistd::sync();
        fio::once(&ONCE, &disk.target(), IMAGE_MB).map(|read| read.mib_s)
    };
    let served = Served { godwit, directory: place.path(), size_mb: IMAGE_MB, filled: true };
    figures.first_touch_mib_s = read(&served.of_image(&repository, NAME)?)?;
    figures.daemon_mib_s = read(&served.of_file(Contender::Daemon, image)?)?;
    figures.file_mib_s = read(&served.of_file(Contender::Raw, image)?)?;
    for (size_mb, figure) in
        [(SMALL_MB, &mut figures.start_small_ms), (LARGE_MB, &mut figures.start_large_ms)]
    {
        let (file, name) = (path(&format!("{size_mb}.raw")), format!("size-{size_mb}"));
        sparse(&file, size_mb)?;
        import(godwit, &repository, &file, &name)?;
        let began = Instant::now();
        let disk = served.of_image(&repository, &name)?;
        disk.read_first()?;
        *figure = began.elapsed().as_secs_f64() * 1e3;
    }
    figures.space_ratio = space(&served)?;
    Ok(figures)
}

/// Writes blocks here and there, each once, and looks what the disk takes.
fn space(served: &Served) -> Result<f64> {
    let disk = Served { size_mb: WRITTEN_MB, filled: false, ..*served }.start(Contender::Godwit)?;
    fio::once(&SCATTERED, &disk.target(), WRITTEN_MB)?;
    drop(disk);
    let entries = std::fs::read_dir(served.directory.join("disk"))?;
    let mut bytes = 0;
    for entry in entries {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes as f64 / (WRITTEN_MB << 20) as f64)
}

fn import(godwit: &Path, repository: &Path, file: &Path, name: &str) -> Result<Duration> {
    let mut command = Command::new(godwit);
    command.arg("--json").args(["image", "import"]).arg(file).args(["--name", name]);
    timed(command.arg("--format").arg("raw").arg("--repository").arg(repository))
}

fn timed(command: &mut Command) -> Result<Duration> {
    // What others left to be written would be this one's to wait for.
    nix::unistd::sync();
    let began = Instant::now();
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(began.elapsed())
}

/// Nothing can be made of random bytes, by anyone.
fn write_random(path: &PathBuf) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..IMAGE_MB {
        random.fill(&mut bytes);
        file.write_all(&bytes)?;
    }
    Ok(file.sync_all()?)
}

/// A megabyte of content, and nothing.
fn sparse(path: &Path, size_mb: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut bytes = vec![0; 1 << 20];
    fastrand::Rng::with_seed(2).fill(&mut bytes);
    file.write_all(&bytes)?;
    Ok(file.set_len(size_mb << 20)?)
}
