//! The identity of this machine, which stays the same after a reboot, and of the boot, which does not.

use std::fs;

/// Files that tell machines apart. The first is copied with a disk's image; the others come from the firmware
/// or a hypervisor, and not every machine has them.
const FILES: [&str; 3] = [
    "/etc/machine-id",
    "/sys/class/dmi/id/product_uuid",
    "/sys/firmware/devicetree/base/serial-number",
];
/// Used if there is none of these: the machine counts as another one with each boot then.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Returns all that identifies this machine, as text.
pub fn facts() -> String {
    let found: Vec<String> = FILES.iter().filter_map(|file| fact(file)).collect();
    match found.as_slice() {
        [] => fact(BOOT).unwrap_or_default(),
        found => found.join("\n"),
    }
}

/// Returns what tells this boot of the machine from all others; `None` if the kernel does not say it.
pub fn boot() -> Option<String> {
    let text = fs::read_to_string(BOOT).ok()?;
    Some(text.trim().to_owned())
}

/// Returns the time since the machine has booted, in hundredths of a second; 0 if the kernel does not say it.
pub fn uptime() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let first = text.split(' ').next().unwrap_or_default();
    first.replace('.', "").parse().unwrap_or_default()
}

fn fact(file: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| format!("{file}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_known_and_stays_the_same() {
        assert_ne!(facts(), "");
        assert_ne!(uptime(), 0);
        assert_eq!(facts(), facts());
    }
}
