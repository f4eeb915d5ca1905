//! Where a peer's files really lead.
//!
//! The policy judges names. Here the files are looked at: a symbolic link, or a file that an image names in its header,
//! may lead out of the accepted directories. What is shared with other hosts can change after it was looked at; who may
//! write to the shared directory itself is the operator's to decide.
//!
//! The header of a qcow2 image is as in QEMU's docs/interop/qcow2.rst: big-endian.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use godwit_qemu::commandline::Policy;

/// Images below images; QEMU itself would go on.
const CHAIN_MAX: usize = 16;
/// The longest name of a backing file that the format allows.
const NAME_BYTES_MAX: u32 = 1023;
/// Bytes of the header that are looked at, extensions included.
const HEADER_BYTES: usize = 112;
const MAGIC: &[u8; 4] = b"QFI\xfb";
/// The image's blocks lie in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// The header extension that says the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Why a file isn't given to a machine of a peer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReachRefusal {
    #[error("{} can't be looked at", file.display())]
    Io { file: PathBuf, source: io::Error },
    #[error("{} leads to {}, which is below none of accept.paths", file.display(), to.display())]
    Outside { file: PathBuf, to: PathBuf },
    #[error("the image {} {problem}", file.display())]
    Image { file: PathBuf, problem: &'static str },
}

/// Whether all of `files`, and whatever they name, lie in the directories that the policy accepts.
///
/// # Errors
/// The first that doesn't.
pub(super) fn check(files: &[PathBuf], policy: &Policy) -> Result<(), ReachRefusal> {
    let real = |directory: &PathBuf| directory.canonicalize().ok();
    let accepted: Vec<PathBuf> = policy.paths.values().filter_map(real).collect();
    files.iter().try_for_each(|file| check_chain(file, &accepted))
}

fn check_chain(first: &Path, accepted: &[PathBuf]) -> Result<(), ReachRefusal> {
    let mut file = first.to_owned();
    for _ in 0..CHAIN_MAX {
        let real = resolve(&file, accepted)?;
        match named_by(&real).map_err(|source| ReachRefusal::Io { file: file.clone(), source })? {
            Named::Nothing => return Ok(()),
            Named::Unreadable(problem) => return Err(ReachRefusal::Image { file, problem }),
            // A relative name begins where the image lies, as it was named.
            Named::Backing(name) => file = file.parent().unwrap_or(Path::new("/")).join(name),
        }
    }
    Err(ReachRefusal::Image { file: first.to_owned(), problem: "is the last of too many" })
}

/// The file behind all links, if it is in an accepted directory.
fn resolve(file: &Path, accepted: &[PathBuf]) -> Result<PathBuf, ReachRefusal> {
    let real = file.canonicalize().map_err(|source| ReachRefusal::Io { file: file.to_owned(), source })?;
    // The links of volumes (/dev/vg/lv) are udev's.
    let volume =
        || file.starts_with("/dev") && real.metadata().is_ok_and(|found| found.file_type().is_block_device());
    if accepted.iter().any(|directory| real.starts_with(directory)) || volume() {
        return Ok(real);
    }
    Err(ReachRefusal::Outside { file: file.to_owned(), to: real })
}

/// What an image's header names.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Nothing,
    Backing(PathBuf),
    Unreadable(&'static str),
}

fn named_by(file: &Path) -> io::Result<Named> {
    // What isn't a file has no header of its own, and reading it could wait for ever.
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Named::Nothing);
    }
    let mut image = File::open(file)?;
    let mut header = Vec::new();
    image.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut header)?;
    if !header.starts_with(MAGIC) {
        return Ok(Named::Nothing);
    }
    let Some(header) = Header::read(&header) else { return Ok(Named::Unreadable("has half a header")) };
    if header.features & EXTERNAL_DATA != 0 {
        return Ok(Named::Unreadable("keeps its data in another file"));
    }
    if header.backing_offset == 0 {
        return Ok(Named::Nothing);
    }
    if header.backing_bytes > NAME_BYTES_MAX || header.backing_offset > u64::from(u32::MAX) {
        return Ok(Named::Unreadable("has a backing file with an impossible name"));
    }
    if !has_backing_format(&mut image, &header)? {
        return Ok(Named::Unreadable(
            "doesn't say the format of its backing file (`qemu-img rebase -u -F` writes it)",
        ));
    }
    image.seek(SeekFrom::Start(header.backing_offset))?;
    let mut name = Vec::new();
    image.take(header.backing_bytes.into()).read_to_end(&mut name)?;
    Ok(backing(name))
}

/// A plain file's name; anything that QEMU would take for a protocol is none.
fn backing(name: Vec<u8>) -> Named {
    match String::from_utf8(name) {
        Ok(name) if !name.is_empty() && !name.contains([':', '\0']) => Named::Backing(name.into()),
        _ => Named::Unreadable("has a backing file that isn't a plain file"),
    }
}

struct Header {
    backing_offset: u64,
    backing_bytes: u32,
    features: u64,
    /// Where the extensions begin.
    bytes: u32,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let version = u32_at(bytes, 4)?;
        let newer = version >= 3;
        Some(Self {
            backing_offset: u64_at(bytes, 8)?,
            backing_bytes: u32_at(bytes, 16)?,
            features: if newer { u64_at(bytes, 72)? } else { 0 },
            bytes: if newer { u32_at(bytes, 100)? } else { 72 },
        })
    }
}

/// Whether the extensions, which stand before the backing file's name, say its format.
fn has_backing_format(image: &mut File, header: &Header) -> io::Result<bool> {
    let mut extensions = Vec::new();
    image.seek(SeekFrom::Start(header.bytes.into()))?;
    image
        .take(header.backing_offset.saturating_sub(header.bytes.into()).min(1 << 16))
        .read_to_end(&mut extensions)?;
    let mut rest = extensions.as_slice();
    while let (Some(kind @ 1..), Some(length)) = (u32_at(rest, 0), u32_at(rest, 4)) {
        if kind == BACKING_FORMAT {
            return Ok(length > 0);
        }
        let next = 8 + (length as usize).next_multiple_of(8);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(false)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, process::Command};

    use super::*;

    struct Scene {
        directory: tempfile::TempDir,
        policy: Policy,
    }

    impl Scene {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("vm")).unwrap();
            fs::write(directory.path().join("secret"), "secret").unwrap();
            let paths = [("/srv/vm".into(), directory.path().join("vm"))].into();
            Self { policy: Policy { paths, ..Policy::default() }, directory }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn check(&self, name: &str) -> Result<(), String> {
            check(&[self.path(name)], &self.policy).map_err(|error| error.to_string())
        }

        fn refused(&self, name: &str, reason: &str) {
            let error = self.check(name).expect_err(name);
            assert!(error.contains(reason) && error.lines().count() == 1, "{error}");
        }

        /// Makes an image with qemu-img, in the accepted directory.
        fn image(&self, arguments: &[&str]) {
            let mut command = Command::new("qemu-img");
            let output = command.arg("create").args(arguments).current_dir(self.path("vm")).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    #[test]
    fn links_out_of_the_accepted_directories_are_refused() {
        let scene = Scene::new();
        fs::write(scene.path("vm/a.img"), "a").unwrap();
        scene.check("vm/a.img").unwrap();
        symlink("a.img", scene.path("vm/inside")).unwrap();
        scene.check("vm/inside").unwrap();
        symlink("../secret", scene.path("vm/outside")).unwrap();
        scene.refused("vm/outside", "which is below none of accept.paths");
        symlink(scene.directory.path(), scene.path("vm/up")).unwrap();
        scene.refused("vm/up/secret", "accept.paths");
        symlink("/dev/mem", scene.path("vm/device")).unwrap();
        scene.refused("vm/device", "can't be looked at");
        symlink("loop", scene.path("vm/loop")).unwrap();
        scene.refused("vm/loop", "can't be looked at");
        scene.refused("vm/missing", "can't be looked at");
        symlink(scene.path("vm"), scene.path("other")).unwrap();
        let through = Policy { paths: [("/x".into(), scene.path("other"))].into(), ..Policy::default() };
        check(&[scene.path("other/a.img")], &through).unwrap();
    }

    #[test]
    fn images_name_no_files_elsewhere() {
        let scene = Scene::new();
        let secret = scene.path("secret").display().to_string();
        scene.image(&["-f", "raw", "base.raw", "1M"]);
        scene.image(&["-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2"]);
        scene.image(&["-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2"]);
        scene.check("vm/top.qcow2").unwrap();
        scene.image(&["-f", "qcow2", "-u", "-b", &secret, "-F", "raw", "out.qcow2", "1M"]);
        scene.refused("vm/out.qcow2", "accept.paths");
        scene.image(&["-f", "qcow2", "-b", "out.qcow2", "-F", "qcow2", "-u", "deep.qcow2", "1M"]);
        scene.refused("vm/deep.qcow2", "accept.paths");
        scene.image(&["-f", "qcow2", "-u", "-b", "../secret", "-F", "raw", "up.qcow2", "1M"]);
        scene.refused("vm/up.qcow2", "accept.paths");
        scene.image(&["-f", "qcow2", "-u", "-b", "nbd:10.0.0.1:1", "-F", "raw", "net.qcow2", "1M"]);
        scene.refused("vm/net.qcow2", "isn't a plain file");
        scene.image(&["-f", "qcow2", "-o", "data_file=base.raw,data_file_raw=on", "data.qcow2", "1M"]);
        scene.refused("vm/data.qcow2", "keeps its data in another file");
        scene.image(&["-f", "qcow2", "-u", "-b", "there.qcow2", "-F", "qcow2", "here.qcow2", "1M"]);
        scene.image(&["-f", "qcow2", "-u", "-b", "here.qcow2", "-F", "qcow2", "there.qcow2", "1M"]);
        scene.refused("vm/here.qcow2", "too many");
    }

    #[test]
    fn a_backing_file_whose_format_would_be_guessed_is_refused() {
        let scene = Scene::new();
        scene.image(&["-f", "raw", "base.raw", "1M"]);
        scene.image(&["-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
        let mut image = fs::read(scene.path("vm/top.qcow2")).unwrap();
        let start = image.windows(4).position(|bytes| bytes == BACKING_FORMAT.to_be_bytes()).unwrap();
        image[start..start + 4].copy_from_slice(b"\x12\x34\x56\x78");
        fs::write(scene.path("vm/top.qcow2"), image).unwrap();
        scene.refused("vm/top.qcow2", "doesn't say the format of its backing file");
    }

    #[test]
    fn damaged_headers_are_refused_or_plain_and_never_a_panic() {
        let scene = Scene::new();
        scene.image(&["-f", "raw", "base.raw", "1M"]);
        scene.image(&["-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
        let image = fs::read(scene.path("vm/top.qcow2")).unwrap();
        for length in 0..130 {
            fs::write(scene.path("vm/cut"), &image[..length]).unwrap();
            let _ = scene.check("vm/cut");
        }
        for offset in 0..HEADER_BYTES {
            let mut damaged = image.clone();
            damaged[offset] = 0xff;
            fs::write(scene.path("vm/damaged"), damaged).unwrap();
            let _ = scene.check("vm/damaged");
        }
    }
}
