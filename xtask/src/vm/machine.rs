//! QEMU: whether it may use the processor's own virtualisation, and a boot from start to end.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::initramfs::Initramfs;
use super::kernel::{Kernel, folder};
use crate::command::{shown, target};
use crate::progress::say;

/// A kernel that boots by KVM is up in one second.
const TRIAL: Duration = Duration::from_secs(15);

/// Who does the processor's work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU, some ten times slower.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

impl Accelerator {
    /// KVM if a kernel boots with it: that the device is there says little in a machine that is
    /// itself virtual.
    pub(crate) fn find(kernel: &Kernel) -> Result<Self> {
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        say("trying KVM");
        let image = image(&crate::build::binary("init", false))?.pack(&[])?;
        let mut up = false;
        let tried = boot(kernel, Self::Kvm, &image, "", TRIAL, |line| {
            up |= line.starts_with("Linux ");
        });
        let found = if tried.is_ok() && up {
            Self::Kvm
        } else {
            Self::Tcg
        };
        say(&format!("using {found}"));
        Ok(found)
    }

    /// How much longer than on the machine itself deadlines are.
    pub(crate) fn scale(self) -> u32 {
        match self {
            Self::Kvm => 2,
            Self::Tcg => 15,
        }
    }
}

/// An image that has an init, and does nothing.
pub(crate) fn image(init: &Path) -> Result<Initramfs> {
    let image = Initramfs::new(&folder().join("root"), init)?;
    image.modules(&[])?;
    Ok(image)
}

/// Boots a kernel and hands on what init says, line by line, until the machine is off.
///
/// # Errors
/// It is not off in time; QEMU cannot be started. The kernel's own words are in
/// `target/logs/vm-….log`.
pub(crate) fn boot(
    kernel: &Kernel,
    accelerator: Accelerator,
    image: &Path,
    append: &str,
    patience: Duration,
    mut hear: impl FnMut(&str),
) -> Result<()> {
    let logs = target().join("logs");
    std::fs::create_dir_all(&logs)?;
    let name = kernel.name.replace('/', "-");
    let log = logs.join(format!("vm-{name}.log"));
    let complaints = logs.join(format!("vm-{name}-qemu.log"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        &accelerator.to_string(),
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "3G",
    ])
    .args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
    ])
    .arg("-serial")
    .arg(format!("file:{}", log.display()))
    .args(["-serial", "stdio", "-kernel"])
    .arg(&kernel.image)
    .arg("-initrd")
    .arg(image)
    .arg("-append")
    .arg(format!(
        "console=ttyS0 panic=-1 mitigations=off DATAPLANE_TEST_SCALE={} {append}",
        accelerator.scale()
    ))
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .stderr(File::create(&complaints)?);
    let child = qemu
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(&qemu)))?;
    let mut child = Killed(child);
    let output = child.0.stdout.take().context("no output of QEMU")?;
    let (send, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { return };
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + patience;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => hear(String::from_utf8_lossy(&line).trim_end_matches('\r')),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => bail!(
                "not off after {} s; the kernel's own words are in {}",
                patience.as_secs(),
                log.display()
            ),
        }
    }
    let status = child.0.wait()?;
    if !status.success() {
        let said = std::fs::read_to_string(&complaints).unwrap_or_default();
        bail!("`{}`: {status}: {}", shown(&qemu), said.trim());
    }
    Ok(())
}

/// Not left behind.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
