//! Guest memory read and written from outside, through the address space of its QEMU.
//!
//! The kernel permits it to the process's parent under the same user (unless a security module forbids it), and to
//! whoever has CAP_SYS_PTRACE. It isn't synchronised with the guest: a page that the guest writes meanwhile may come
//! half old, half new; QEMU's dirty log names it again then.

use std::io::{IoSlice, IoSliceMut};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

/// Unit of all transfers.
pub const PAGE_BYTES: usize = 4096;

/// Pages in one system call; more gains nothing.
pub const MAX_PAGES_A_CALL: usize = 256;

/// A page, counted through all ranges in the order in which they were given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A piece of a process's address space, such as a RAM block of [`crate::ramblock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Where it begins; a multiple of [`PAGE_BYTES`].
    pub host_address: u64,
    /// Its size; a multiple of [`PAGE_BYTES`].
    pub bytes: u64,
}

/// Memory of another process can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum ProcessMemoryError {
    /// Neither parent nor privileged.
    #[error("not permitted to reach the memory of process {pid}: it takes CAP_SYS_PTRACE")]
    NotPermitted {
        /// The process.
        pid: i32,
    },
    /// It ended, or its number belongs to another by now.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// Nothing (readable or writable) is mapped there.
    #[error("no memory at {address:#x} in process {pid}")]
    Fault {
        /// The process.
        pid: i32,
        /// The page's address.
        address: u64,
    },
    /// A range that no mapping can have.
    #[error("memory range of {bytes} bytes at {host_address:#x} isn't made of pages of {PAGE_BYTES} bytes")]
    Range {
        /// Its address.
        host_address: u64,
        /// Its size.
        bytes: u64,
    },
    /// Outside of all ranges.
    #[error("page {} is beyond the last, {pages} in all", .page.0)]
    OutOfRange {
        /// The page that was asked for.
        page: PageIndex,
        /// How many there are.
        pages: u64,
    },
    /// One buffer must hold exactly the pages named.
    #[error("{pages} pages don't fit a buffer of {bytes} bytes")]
    BufferSize {
        /// Pages named.
        pages: usize,
        /// The buffer's size.
        bytes: usize,
    },
    /// Anything else that the kernel says.
    #[error("memory of process {pid} can't be reached")]
    System {
        /// The process.
        pid: i32,
        /// The kernel's error.
        source: Errno,
    },
}

/// Some ranges of another process's memory.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: Pid,
    start_ticks: u64,
    ranges: Vec<NumberedRange>,
    pages: u64,
}

#[derive(Debug, Clone, Copy)]
struct NumberedRange {
    first_page: u64,
    host_address: u64,
}

impl ProcessMemory {
    /// Remembers the process and the ranges; touches no memory yet, see [`probe`](Self::probe).
    ///
    /// # Errors
    /// There is no such process, or a range isn't made of whole pages.
    pub fn open(pid: u32, ranges: &[MemoryRange]) -> Result<Self, ProcessMemoryError> {
        let pid = Pid::from_raw(pid as i32);
        let start_ticks = start_ticks(pid).ok_or(ProcessMemoryError::Gone { pid: pid.as_raw() })?;
        let mut numbered = Vec::with_capacity(ranges.len());
        let mut pages = 0;
        for &MemoryRange { host_address, bytes } in ranges {
            let aligned = (host_address | bytes).is_multiple_of(PAGE_BYTES as u64);
            if !aligned || host_address.checked_add(bytes).is_none() {
                return Err(ProcessMemoryError::Range { host_address, bytes });
            }
            numbered.push(NumberedRange { first_page: pages, host_address });
            pages += bytes / PAGE_BYTES as u64;
        }
        Ok(Self { pid, start_ticks, ranges: numbered, pages })
    }

    /// How many pages all ranges have together.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Reads one page to learn whether reading is permitted at all.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn probe(&self) -> Result<(), ProcessMemoryError> {
        match self.pages {
            0 => Ok(()),
            _ => self.read([PageIndex(0)].into_iter(), &mut [0; PAGE_BYTES]),
        }
    }

    /// The number still belongs to the process that was opened. Ask after a transfer: then the transfer reached it.
    pub fn still_same(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Reads scattered pages, one behind the other, into `buffer`.
    ///
    /// # Errors
    /// Names what stands in the way; the buffer's contents are undefined then.
    pub fn read(
        &self,
        pages: impl ExactSizeIterator<Item = PageIndex>,
        buffer: &mut [u8],
    ) -> Result<(), ProcessMemoryError> {
        check_size(pages.len(), buffer.len())?;
        let mut pages = pages;
        for piece in buffer.chunks_mut(MAX_PAGES_A_CALL * PAGE_BYTES) {
            let remote = self.remote(&mut pages, piece.len())?;
            let done = process_vm_readv(self.pid, &mut [IoSliceMut::new(piece)], &remote);
            self.check(done, &remote)?;
        }
        Ok(())
    }

    /// Writes scattered pages that lie one behind the other in `buffer`.
    ///
    /// # Errors
    /// Names what stands in the way; pages before the one named may have been written.
    pub fn write(
        &self,
        pages: impl ExactSizeIterator<Item = PageIndex>,
        buffer: &[u8],
    ) -> Result<(), ProcessMemoryError> {
        check_size(pages.len(), buffer.len())?;
        let mut pages = pages;
        for piece in buffer.chunks(MAX_PAGES_A_CALL * PAGE_BYTES) {
            let remote = self.remote(&mut pages, piece.len())?;
            let done = process_vm_writev(self.pid, &[IoSlice::new(piece)], &remote);
            self.check(done, &remote)?;
        }
        Ok(())
    }

    /// The addresses of the next pages, as many as fill so many bytes.
    fn remote(
        &self,
        pages: &mut impl Iterator<Item = PageIndex>,
        bytes: usize,
    ) -> Result<Vec<RemoteIoVec>, ProcessMemoryError> {
        let addressed = pages.take(bytes / PAGE_BYTES).map(|page| {
            let base = self.address(page)? as usize;
            Ok(RemoteIoVec { base, len: PAGE_BYTES })
        });
        addressed.collect()
    }

    fn address(&self, page: PageIndex) -> Result<u64, ProcessMemoryError> {
        if page.0 >= self.pages {
            return Err(ProcessMemoryError::OutOfRange { page, pages: self.pages });
        }
        let after = self.ranges.partition_point(|range| range.first_page <= page.0);
        let range = self.ranges[after - 1];
        Ok(range.host_address + (page.0 - range.first_page) * PAGE_BYTES as u64)
    }

    fn check(&self, done: nix::Result<usize>, remote: &[RemoteIoVec]) -> Result<(), ProcessMemoryError> {
        let pid = self.pid.as_raw();
        let fault = |page: usize| ProcessMemoryError::Fault { pid, address: remote[page].base as u64 };
        match done {
            Ok(bytes) if bytes == remote.len() * PAGE_BYTES => Ok(()),
            Ok(bytes) => Err(fault(bytes / PAGE_BYTES)),
            Err(Errno::EFAULT) => Err(fault(0)),
            Err(Errno::EPERM) => Err(ProcessMemoryError::NotPermitted { pid }),
            Err(Errno::ESRCH) => Err(ProcessMemoryError::Gone { pid }),
            Err(source) => Err(ProcessMemoryError::System { pid, source }),
        }
    }
}

fn check_size(pages: usize, bytes: usize) -> Result<(), ProcessMemoryError> {
    match pages.checked_mul(PAGE_BYTES) == Some(bytes) {
        true => Ok(()),
        false => Err(ProcessMemoryError::BufferSize { pages, bytes }),
    }
}

/// When the process started, in clock ticks since boot: with the number it names a process for good.
fn start_ticks(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pages of this very process that hold 1 and 2.
    #[repr(align(4096))]
    struct Pages([[u8; PAGE_BYTES]; 2]);

    static PAGES: Pages = Pages([[1; PAGE_BYTES], [2; PAGE_BYTES]]);

    /// Nothing is ever mapped that low.
    const UNMAPPED: MemoryRange = MemoryRange { host_address: 0x1000, bytes: PAGE_BYTES as u64 };

    fn mapped() -> MemoryRange {
        MemoryRange { host_address: PAGES.0.as_ptr() as u64, bytes: 2 * PAGE_BYTES as u64 }
    }

    fn own(ranges: &[MemoryRange]) -> ProcessMemory {
        ProcessMemory::open(std::process::id(), ranges).unwrap()
    }

    fn read(memory: &ProcessMemory, pages: &[u64]) -> Result<Vec<u8>, ProcessMemoryError> {
        let mut buffer = vec![0; pages.len() * PAGE_BYTES];
        memory.read(pages.iter().map(|page| PageIndex(*page)), &mut buffer)?;
        Ok(buffer.iter().step_by(PAGE_BYTES).copied().collect())
    }

    #[test]
    fn pages_count_through_the_ranges() {
        let memory = own(&[mapped(), mapped()]);
        assert_eq!(memory.pages(), 4);
        assert_eq!(read(&memory, &[3, 0, 2, 1]).unwrap(), [2, 1, 1, 2]);
    }

    #[test]
    fn more_pages_than_one_call_takes() {
        let pages = (0..2 * MAX_PAGES_A_CALL as u64 + 3).map(|page| page % 2).collect::<Vec<_>>();
        let expected = pages.iter().map(|page| *page as u8 + 1).collect::<Vec<_>>();
        assert_eq!(read(&own(&[mapped()]), &pages).unwrap(), expected);
    }

    #[test]
    fn a_fault_names_the_page_that_is_not_there() {
        let memory = own(&[mapped(), UNMAPPED]);
        for pages in [&[2][..], &[0, 1, 2], &[2; MAX_PAGES_A_CALL + 1]] {
            let error = read(&memory, pages).unwrap_err();
            assert!(matches!(error, ProcessMemoryError::Fault { address: 0x1000, .. }), "{error}");
        }
        let error = memory.write([PageIndex(2)].into_iter(), &[0; PAGE_BYTES]).unwrap_err();
        assert!(matches!(error, ProcessMemoryError::Fault { address: 0x1000, .. }), "{error}");
    }

    #[test]
    fn nothing_outside_of_the_ranges_is_touched() {
        let memory = own(&[mapped()]);
        for page in [2, u64::MAX] {
            let error = read(&memory, &[0, page]).unwrap_err();
            assert!(matches!(error, ProcessMemoryError::OutOfRange { pages: 2, .. }), "{error}");
        }
        let error = memory.read([PageIndex(0)].into_iter(), &mut [0; 100]).unwrap_err();
        assert!(matches!(error, ProcessMemoryError::BufferSize { pages: 1, bytes: 100 }), "{error}");
        let odd = MemoryRange { host_address: 0x1001, bytes: 4096 };
        let endless = MemoryRange { host_address: 0x1000, bytes: !0xfff };
        for range in [odd, endless] {
            assert!(ProcessMemory::open(std::process::id(), &[range]).is_err());
        }
    }

    #[test]
    fn a_process_that_ended_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let memory = ProcessMemory::open(child.id(), &[UNMAPPED]).unwrap();
        assert!(memory.still_same());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!memory.still_same());
        assert!(matches!(memory.probe(), Err(ProcessMemoryError::Gone { .. })));
    }
}
