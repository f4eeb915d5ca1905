//! What a guest does to itself in the middle of a migration: it powers off, starts anew, panics, or falls asleep.

use nix::sys::reboot::{RebootMode, reboot};

/// The number of this boot: the same for as long as this kernel lives, wherever it runs, and another after that.
pub(crate) fn boot() -> u64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&digits, 16).unwrap_or_default()
}

/// Powers the guest off.
pub(crate) fn off() -> String {
    crate::boot::lower_network();
    refused(reboot(RebootMode::RB_POWER_OFF))
}

/// Starts the guest anew at once.
pub(crate) fn reset() -> String {
    crate::boot::lower_network();
    refused(reboot(RebootMode::RB_AUTOBOOT))
}

/// Makes the kernel panic; with `panic=-1` on its command line it then starts anew.
pub(crate) fn panic() -> String {
    // Without this only some keys are obeyed.
    let _ = std::fs::write("/proc/sys/kernel/sysrq", "1");
    refused(std::fs::write("/proc/sysrq-trigger", "c"))
}

/// Suspends the guest to its memory. It says nothing when it wakes: whoever woke it knows.
pub(crate) fn suspend() -> String {
    std::fs::write("/sys/power/state", "mem")
        .map_or_else(|error| format!("refused: {error}\n"), |()| String::new())
}

/// Where the guest is still there to answer, it was refused.
fn refused<T, E: std::fmt::Display>(result: Result<T, E>) -> String {
    let reason = result.err().map_or_else(|| "nothing happened".to_owned(), |error| error.to_string());
    format!("refused: {reason}\n")
}
