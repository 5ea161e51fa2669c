//! QEMU: the choice of the accelerator, and a boot from start to end.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::initramfs::Initramfs;
use super::kernel::{Kernel, folder};
use crate::command::{shown, target};
use crate::progress::say;

/// The time limit of the trial with KVM, in which a kernel boots within one second.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(15);

/// The accelerator of a machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// The processor's virtualisation.
    Kvm,
    /// QEMU's emulation, about ten times slower.
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
    /// Returns KVM if a kernel boots with it: the presence of its device says little in a machine that is itself
    /// virtual.
    pub(crate) fn find(kernel: &Kernel, init: &Path) -> Result<Self> {
        let why = if Path::new("/dev/kvm").exists() {
            say("trying KVM");
            let image = image(&kernel.name, init)?.pack(&[])?;
            let mut up = false;
            let tried = boot(kernel, Self::Kvm, &image, "", TRIAL_TIMEOUT, |line| {
                up |= line.starts_with("Linux ");
            });
            match tried {
                Ok(_) if up => {
                    say("using kvm");
                    return Ok(Self::Kvm);
                }
                Ok(_) => "the kernel went off before its init".to_owned(),
                Err(error) => format!("{error:#}"),
            }
        } else {
            "there is no /dev/kvm".to_owned()
        };
        say(&format!("using tcg, which is some ten times slower: {why}"));
        Ok(Self::Tcg)
    }

    /// Returns the factor for deadlines, compared to this machine.
    pub(crate) fn scale(self) -> u32 {
        match self {
            Self::Kvm => 2,
            Self::Tcg => 15,
        }
    }
}

/// Returns an image for a kernel, with an init but without a plan.
pub(crate) fn image(kernel: &str, init: &Path) -> Result<Initramfs> {
    let name = format!("root-{}", kernel.replace(['/', '.'], "-"));
    let image = Initramfs::new(&folder().join(name), init)?;
    image.modules(&[])?;
    Ok(image)
}

/// Returns the path of the log for the kernel's own messages.
pub(crate) fn log(kernel: &str) -> PathBuf {
    let name = kernel.replace('/', "-");
    target().join("logs").join(format!("vm-{name}.log"))
}

/// Boots a kernel and passes on init's output, line by line, until the machine is off. Returns the kernel's own
/// complaints: tests that pass would not show a bug of the kernel.
///
/// # Errors
/// The machine is not off in time; QEMU cannot be started, or fails.
pub(crate) fn boot(
    kernel: &Kernel,
    accelerator: Accelerator,
    image: &Path,
    append: &str,
    patience: Duration,
    mut hear: impl FnMut(&str),
) -> Result<Vec<String>> {
    let log = log(&kernel.name);
    let complaints = log.with_extension("qemu.log");
    fs::create_dir_all(target().join("logs"))?;
    let mut qemu = Command::new("setpriv");
    // The machine ends with this process, however that ends.
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
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
        "console=ttyS0 panic=-1 oops=panic nowatchdog mitigations=off DATAPLANE_TEST_SCALE={} {append}",
        accelerator.scale()
    ))
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .stderr(File::create(&complaints)?);
    let child = qemu
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(&qemu)))?;
    let mut child = KillOnDrop(child);
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
        let said = fs::read_to_string(&complaints).unwrap_or_default();
        bail!("QEMU: {status}: {}", said.trim());
    }
    let said = fs::read(&log).with_context(|| log.display().to_string())?;
    let said = String::from_utf8_lossy(&said);
    let bugs = ["BUG:", "WARNING:", "Oops", "Kernel panic"];
    let complains = |line: &&str| bugs.iter().any(|bug| line.contains(bug));
    Ok(said
        .lines()
        .filter(complains)
        .map(|line| format!("the kernel: {line} (all of it: {})", log.display()))
        .collect())
}

/// A child process that is killed on drop.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
