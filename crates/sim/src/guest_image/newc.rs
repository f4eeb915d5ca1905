//! The cpio format "newc" that the kernel unpacks as initramfs (Documentation/driver-api/early-userspace).

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

/// An archive that grows.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(super) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[]);
    }

    pub(super) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, REGULAR | permissions, (0, 0), content);
    }

    /// `/dev/console`, without which process 1 starts with no output.
    pub(super) fn console(&mut self, name: &str) {
        self.entry(name, CHARACTER_DEVICE | 0o600, (5, 1), &[]);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (device_major, device_minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (owner, group, links, time, checksum) = (0, 0, 1, 0, 0);
        let name_bytes = name.len() as u32 + 1;
        let fields = [
            self.entries,
            mode,
            owner,
            group,
            links,
            time,
            content.len() as u32,
            0,
            0,
            device_major,
            device_minor,
            name_bytes,
            checksum,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busybox_reads_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let mut archive = Archive::default();
        archive.directory("sub");
        archive.file("sub/odd", 0o644, b"12345");
        archive.file("even", 0o755, b"1234");
        let path = directory.path().join("archive");
        std::fs::write(&path, archive.finish()).unwrap();
        let unpacked = std::process::Command::new("busybox")
            .args(["cpio", "-idm", "-F"])
            .arg(&path)
            .current_dir(directory.path())
            .status();
        let Ok(status) = unpacked else { return };
        assert!(status.success());
        assert_eq!(std::fs::read(directory.path().join("sub/odd")).unwrap(), b"12345");
        assert_eq!(std::fs::read(directory.path().join("even")).unwrap(), b"1234");
    }
}
