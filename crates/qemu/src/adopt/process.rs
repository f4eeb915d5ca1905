//! The process behind a QMP socket.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// A command line longer than this isn't read.
const COMMAND_LINE_BYTES_MAX: u64 = 1 << 20;

/// A process as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its command line, the program first.
    pub argv: Vec<String>,
    /// Where its relative paths begin; `None` if that may not be known: it is another user's process.
    pub working_directory: Option<PathBuf>,
}

/// Why the process behind a socket can't be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Nobody listens there.
    #[error("can't connect to the monitor {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel shows no process of ours: another PID namespace, or it is gone.
    #[error("the process that listens at {path} isn't visible from here")]
    Invisible {
        /// The socket.
        path: PathBuf,
    },
    /// A file below `/proc` can't be read.
    #[error("can't read {path} of QEMU's process")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An argument isn't text.
    #[error("the command line of process {pid} isn't UTF-8 or is longer than 1 MiB")]
    NotText {
        /// The process.
        pid: i32,
    },
}

/// The process that listens at a unix socket, daemonised or not: QEMU forks before it makes its sockets.
///
/// # Errors
/// See [`ProcessError`].
pub fn process_of(socket: &Path) -> Result<Process, ProcessError> {
    let connect = |source| ProcessError::Connect { path: socket.to_owned(), source };
    let stream = UnixStream::connect(socket).map_err(connect)?;
    let credentials = getsockopt(&stream, PeerCredentials).map_err(|errno| connect(errno.into()))?;
    if credentials.pid() <= 0 {
        return Err(ProcessError::Invisible { path: socket.to_owned() });
    }
    Process::read(credentials.pid())
}

impl Process {
    /// What the kernel shows of a process.
    ///
    /// # Errors
    /// [`ProcessError::Read`] if it is gone.
    pub fn read(pid: i32) -> Result<Self, ProcessError> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let argv = command_line(pid, &directory.join("cmdline"))?;
        let path = directory.join("cwd");
        let working_directory = match fs::read_link(&path) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(source) => return Err(ProcessError::Read { path, source }),
        };
        Ok(Self { pid, argv, working_directory })
    }
}

fn command_line(pid: i32, path: &Path) -> Result<Vec<String>, ProcessError> {
    use io::Read;
    let read = |source| ProcessError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(read)?;
    file.take(COMMAND_LINE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > COMMAND_LINE_BYTES_MAX {
        return Err(ProcessError::NotText { pid });
    }
    let text = String::from_utf8(bytes).map_err(|_| ProcessError::NotText { pid })?;
    Ok(text.split_terminator('\0').map(str::to_owned).collect())
}
