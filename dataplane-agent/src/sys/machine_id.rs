//! Which machine this is, also after it has booted again.

use std::fs;

/// What tells machines apart. The first is copied with a disk's image, and the others are the firmware's
/// or a hypervisor's, which not every machine has.
const FILES: [&str; 3] = [
    "/etc/machine-id",
    "/sys/class/dmi/id/product_uuid",
    "/sys/firmware/devicetree/base/serial-number",
];
/// Where there is none of these a machine is another one with each boot.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// All that this machine says of itself.
pub fn facts() -> String {
    let found: Vec<String> = FILES.iter().filter_map(|file| fact(file)).collect();
    match found.as_slice() {
        [] => fact(BOOT).unwrap_or_default(),
        found => found.join("\n"),
    }
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
        assert_eq!(facts(), facts());
    }
}
