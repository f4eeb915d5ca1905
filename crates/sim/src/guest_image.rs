//! The kernel and the initramfs that test guests boot.
//!
//! The kernel is the distribution's cloud kernel, unpacked (not installed) under `target/guest/kernel` by
//! `cargo xtask setup`. The initramfs holds `godwit-guest` as process 1, busybox, and the virtio drivers with all they
//! need, and is kept under a name made from what went into it. For guests that run a real program there is more, see
//! [`Program`].

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use thiserror::Error;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

mod modules;
mod newc;
mod programs;

use newc::Archive;
pub use programs::{BUILD, PROGRAMS, Program, packages_directory};

const BUSYBOX: &str = "/bin/busybox";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Drivers the guest loads; what they need comes along.
const DRIVERS: [&str; 6] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon"];

/// What the guest's program prints on its console when it works and answers.
pub const READY: &str = "GODWIT-GUEST READY";

/// Names the accelerator of test guests in the environment; TCG without it, which works everywhere.
pub const ACCELERATOR_VARIABLE: &str = "GODWIT_TEST_ACCELERATOR";

/// What executes test guests: `tcg` or `kvm`, as [`ACCELERATOR_VARIABLE`] says.
pub fn accelerator() -> &'static str {
    let kvm = std::env::var_os(ACCELERATOR_VARIABLE).is_some_and(|name| name == "kvm");
    if kvm { "kvm" } else { "tcg" }
}

/// A bootable guest, for QEMU's `-kernel` and `-initrd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// There is no guest to boot.
#[derive(Debug, Error)]
pub enum GuestImageError {
    /// Setup hasn't been run.
    #[error("no guest kernel under {0}: run cargo xtask setup")]
    NoKernel(PathBuf),
    /// The kernel's package has other drivers than expected.
    #[error("the guest kernel has no module {0}")]
    NoModule(String),
    /// A program's packages lack something, or aren't unpacked.
    #[error("the guests' packages have no {library}, which {program} needs")]
    NoLibrary {
        /// Who needs it.
        program: String,
        /// What.
        library: String,
    },
    /// The guest's program couldn't be built.
    #[error("building godwit-guest failed: {0}")]
    Build(String),
    /// A file couldn't be read, written or unpacked.
    #[error("cannot read or write {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl GuestImageError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> GuestImageError {
        let path = path.to_owned();
        move |source| GuestImageError::Io { path, source }
    }
}

impl GuestImage {
    /// The guest as the sources have it, built where it isn't yet.
    ///
    /// # Errors
    /// Without a kernel or busybox (`cargo xtask setup` brings both), or when the guest's program doesn't build.
    pub fn ensure() -> Result<GuestImage, GuestImageError> {
        let kernel = kernel()?;
        let directory = directory();
        let initrd = directory.join(format!("initrd-{:016x}", fingerprint(&kernel)?));
        if !initrd.exists() {
            keep(&initrd, &build(&kernel)?)?;
        }
        Ok(GuestImage { kernel, initrd })
    }

    /// The same guest with a real program, whose packages must be unpacked; [`Program::command`] starts it.
    ///
    /// # Errors
    /// When the packages lack something, or a file can't be read or written.
    pub fn with_program(&self, program: &Program) -> Result<GuestImage, GuestImageError> {
        let mut bytes = std::fs::read(&self.initrd).map_err(GuestImageError::io(&self.initrd))?;
        bytes.extend(program.archive()?);
        let initrd = directory().join(format!("initrd-{}-{:016x}", program.name, xxh3_64(&bytes)));
        if !initrd.exists() {
            keep(&initrd, &bytes)?;
        }
        Ok(GuestImage { kernel: self.kernel.clone(), initrd })
    }

    /// A kernel command line: the workload (see the guest's own page), its address, and where its beat goes.
    ///
    /// ```
    /// # use godwit_sim::guest_image::GuestImage;
    /// let line = GuestImage::command_line("light", "10.78.0.10".parse().unwrap(), None);
    /// assert_eq!(line, "console=ttyS0 quiet panic=-1 workload=light address=10.78.0.10");
    /// ```
    pub fn command_line(
        workload: &str,
        address: std::net::Ipv4Addr,
        observer: Option<std::net::SocketAddr>,
    ) -> String {
        let observer = observer.map(|observer| format!(" observer={observer}")).unwrap_or_default();
        format!("console=ttyS0 quiet panic=-1 workload={workload} address={address}{observer}")
    }

    /// What to add to the kernel command line, which has room for 2,048 bytes in all, to have the guest run a shell's command
    /// again and again. Each line that it prints counts like a write.
    ///
    /// ```
    /// # use godwit_sim::guest_image::GuestImage;
    /// assert_eq!(GuestImage::command_word("ls -l"), " command=6c73202d6c");
    /// ```
    pub fn command_word(command: &str) -> String {
        let digits: String = command.bytes().map(|byte| format!("{byte:02x}")).collect();
        format!(" command={digits}")
    }
}

/// Writes a file that is there as a whole or not at all.
fn keep(path: &Path, bytes: &[u8]) -> Result<(), GuestImageError> {
    let unfinished = path.with_file_name(format!("initrd-unfinished-{}", std::process::id()));
    std::fs::write(&unfinished, bytes).map_err(GuestImageError::io(&unfinished))?;
    std::fs::rename(&unfinished, path).map_err(GuestImageError::io(path))
}

/// Where guests' kernels and images are kept.
pub fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| workspace().join("target")).join("guest")
}

/// Where the kernel's package is to be unpacked.
pub fn kernel_directory() -> PathBuf {
    directory().join("kernel")
}

/// The unpacked kernel.
///
/// # Errors
/// [`GuestImageError::NoKernel`] when there is none.
pub fn kernel() -> Result<PathBuf, GuestImageError> {
    let boot = kernel_directory().join("boot");
    let files = std::fs::read_dir(&boot).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_kernel = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"))
    };
    files.filter(is_kernel).max().ok_or(GuestImageError::NoKernel(boot))
}

/// The root of the checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("crates/sim is two levels below the workspace")
}

/// A digest of all that an image is made from, this module included.
fn fingerprint(kernel: &Path) -> Result<u64, GuestImageError> {
    let mut inputs = vec![workspace().join("Cargo.lock"), PathBuf::from(BUSYBOX)];
    inputs.push(workspace().join("crates/guest/Cargo.toml"));
    for sources in [workspace().join("crates/guest/src"), workspace().join("crates/sim/src/guest_image")] {
        inputs.extend(files_below(&sources).map_err(GuestImageError::io(&sources))?);
    }
    let mut digest = Xxh3::new();
    digest.update(include_bytes!("guest_image.rs"));
    digest.update(kernel.as_os_str().as_encoded_bytes());
    for input in inputs {
        digest.update(&std::fs::read(&input).map_err(GuestImageError::io(&input))?);
    }
    Ok(digest.digest())
}

fn build(kernel: &Path) -> Result<Vec<u8>, GuestImageError> {
    let mut archive = Archive::default();
    for name in ["bin", "dev", "etc", "modules", "proc", "sys", "tmp"] {
        archive.directory(name);
    }
    archive.console("dev/console");
    let read = |path: &Path| std::fs::read(path).map_err(GuestImageError::io(path));
    archive.file("init", 0o755, &read(&build_program()?)?);
    archive.file("bin/busybox", 0o755, &read(Path::new(BUSYBOX))?);
    let mut order = String::new();
    for module in modules::closure(&modules_of(kernel), &DRIVERS)? {
        archive.file(&format!("modules/{}", module.name), 0o644, &module.bytes);
        order.push_str(&module.name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

fn modules_of(kernel: &Path) -> PathBuf {
    let name = kernel.file_name().and_then(OsStr::to_str).unwrap_or_default();
    kernel_directory().join("lib/modules").join(name.trim_start_matches("vmlinuz-"))
}

/// Builds the guest's program, linked statically, apart from the workspace's own builds.
fn build_program() -> Result<PathBuf, GuestImageError> {
    let target = directory().join("build");
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(workspace())
        .args(["build", "--quiet", "--locked", "--release", "--package", "godwit-guest", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\u{1f}-Cstrip=symbols")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| GuestImageError::Build(error.to_string()))?;
    if !output.status.success() {
        return Err(GuestImageError::Build(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(target.join(TARGET).join("release/godwit-guest"))
}

/// All files below a directory, in a fixed order.
fn files_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
