//! Whether KVM runs a guest here. A device that opens says little: there are nested hosts where guests hang.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use godwit_sim::guest_image::{GuestImage, READY};

/// Under KVM the guest is up within two seconds; under TCG within four.
const BOOT_LIMIT: Duration = Duration::from_secs(20);

/// Boots the tests' own guest under KVM.
///
/// # Errors
/// One line: what doesn't work.
pub(crate) fn probe() -> Result<()> {
    let image = GuestImage::ensure()?;
    let guest = Command::new("qemu-system-x86_64")
        .args(["-accel", "kvm", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run qemu-system-x86_64")?;
    let mut guest = Ended(guest);
    let output = guest.0.stdout.take().context("a guest without a console")?;
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(output).split(b'\n').map_while(Result::ok);
        let _ = tell.send(lines.any(|line| String::from_utf8_lossy(&line).contains(READY)));
    });
    match told.recv_timeout(BOOT_LIMIT) {
        Ok(true) => Ok(()),
        Ok(false) => bail!("KVM doesn't run a guest here: QEMU ended (does /dev/kvm open?)"),
        Err(_) => bail!("KVM doesn't run a guest here: it isn't up after {} s", BOOT_LIMIT.as_secs()),
    }
}

/// A guest that ends with its probe.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
