//! A command that is run again and again, and what it has done.

use std::{
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How long a command that failed waits for its next try.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Has a shell run `command`, and again when it ends. Each line that it prints is a piece of work done.
pub(crate) fn keep_running(command: &str, work: &AtomicU64) -> ! {
    loop {
        match run(command, work) {
            Ok(status) if status.success() => {}
            ended => {
                eprintln!("{command}: {ended:?}");
                std::thread::sleep(AGAIN_AFTER);
            }
        }
    }
}

fn run(command: &str, work: &AtomicU64) -> std::io::Result<ExitStatus> {
    let mut child = Command::new("/bin/sh").args(["-c", command]).stdout(Stdio::piped()).spawn()?;
    count_lines(&mut child, work)?;
    child.wait()
}

fn count_lines(child: &mut Child, work: &AtomicU64) -> std::io::Result<()> {
    let Some(output) = &mut child.stdout else { return Ok(()) };
    let mut buffer = [0; 4096];
    loop {
        let bytes = output.read(&mut buffer)?;
        if bytes == 0 {
            return Ok(());
        }
        let lines = buffer[..bytes].iter().filter(|byte| **byte == b'\n').count();
        work.fetch_add(lines as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_run_are_counted() {
        let work = AtomicU64::new(0);
        assert!(run("echo one; echo two; echo three >&2; printf four", &work).unwrap().success());
        assert!(!run("seq 5000; false", &work).unwrap().success());
        assert_eq!(work.into_inner(), 5002);
    }
}
