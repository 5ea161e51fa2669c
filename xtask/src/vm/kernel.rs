//! Kernels to boot: Debian's cloud kernels, fetched once, or a local one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{output, target};
use crate::progress::{run_quietly, say};
use crate::setup;

/// The kernels that the agent supports, oldest first.
pub(crate) const VERSIONS: &[&str] = &["6.1", "6.12"];
/// The modules that the tests need if a kernel has them not built in. No others are loaded: neither the tests
/// nor the agent may depend on them.
const MODULES: &[&str] = &["fuse", "veth"];

/// A kernel module, uncompressed, as not every kernel can decompress modules.
pub(crate) struct Module {
    /// The file's name.
    pub(crate) name: String,
    /// The file.
    pub(crate) bytes: Vec<u8>,
}

/// A kernel that can be booted.
pub(crate) struct Kernel {
    /// The version or path by which it was requested.
    pub(crate) name: String,
    /// Its release, as `uname -r` prints it.
    pub(crate) release: String,
    /// Its image.
    pub(crate) image: PathBuf,
    /// The folder of its modules; `None` if all is built in.
    modules: Option<PathBuf>,
}

impl Kernel {
    /// Finds or fetches a kernel, by version or by path.
    pub(crate) fn find(name: &str) -> Result<Self> {
        let path = Path::new(name);
        if VERSIONS.contains(&name) {
            return Self::unpacked(name, &fetch(name)?);
        }
        ensure!(
            path.exists(),
            "--kernel {name}: neither a path nor one of {}",
            VERSIONS.join(", ")
        );
        if path.is_dir() {
            return Self::unpacked(name, path);
        }
        if path.extension().is_some_and(|end| end == "deb") {
            return Self::unpacked(name, &unpack(path, &folder().join(place(path)?))?);
        }
        Ok(Self {
            name: name.to_owned(),
            release: "of this image".into(),
            image: path.to_owned(),
            modules: None,
        })
    }

    /// Returns the kernel of a package that is unpacked to `folder`.
    fn unpacked(name: &str, folder: &Path) -> Result<Self> {
        let boot = folder.join("boot");
        let entries = fs::read_dir(&boot).with_context(|| boot.display().to_string())?;
        for entry in entries {
            let file = entry?.file_name();
            let Some(release) = file.to_str().and_then(|file| file.strip_prefix("vmlinuz-")) else {
                continue;
            };
            let modules =
                ["lib/modules", "usr/lib/modules"].map(|lib| folder.join(lib).join(release));
            return Ok(Self {
                name: name.to_owned(),
                release: release.to_owned(),
                image: boot.join(&file),
                modules: modules.into_iter().find(|modules| modules.exists()),
            });
        }
        bail!("{}: no vmlinuz-… in it", boot.display())
    }

    /// Returns the modules that the tests need, each after its dependencies.
    pub(crate) fn modules(&self) -> Result<Vec<Module>> {
        let mut ordered = Vec::new();
        if let Some(folder) = &self.modules {
            for name in MODULES {
                order(folder, name, &mut ordered)?;
            }
        }
        Ok(ordered)
    }
}

/// Appends a module after its dependencies, unless it is built in.
fn order(folder: &Path, name: &str, ordered: &mut Vec<Module>) -> Result<()> {
    let file = format!("{name}.ko");
    let list = folder.join("modules.builtin");
    let built_in = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
    if ordered.iter().any(|module| module.name == file) {
        return Ok(());
    }
    if built_in
        .lines()
        .any(|line| line.ends_with(&format!("/{file}")))
    {
        return Ok(());
    }
    let Some(module) = search(&folder.join("kernel"), &file)? else {
        bail!("{}: no module {name}", folder.display());
    };
    let bytes = if module.extension().is_some_and(|end| end == "xz") {
        let mut xz = Command::new("xz");
        let done = xz
            .args(["--decompress", "--stdout"])
            .arg(&module)
            .output()?;
        ensure!(
            done.status.success(),
            "{}: {}",
            module.display(),
            done.status
        );
        done.stdout
    } else {
        fs::read(&module).with_context(|| module.display().to_string())?
    };
    // `.modinfo` is a list of `name=value`, each ended by a zero.
    let depends = bytes
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))
        .unwrap_or_default();
    for other in String::from_utf8_lossy(depends).split(',') {
        if !other.is_empty() {
            order(folder, other, ordered)?;
        }
    }
    ordered.push(Module { name: file, bytes });
    Ok(())
}

/// Finds a file of that name, or of that name with `.xz` appended.
fn search(folder: &Path, file: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = search(&path, file)? {
                return Ok(Some(found));
            }
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && name
                .strip_prefix(file)
                .is_some_and(|rest| ["", ".xz"].contains(&rest))
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Fetches Debian's newest cloud kernel of a version, and returns the folder that it is unpacked to.
fn fetch(version: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder())?;
    let (package, unpacked) = match download(version) {
        Ok(found) => found,
        Err(error) => {
            // A fresh machine has no package lists, or outdated ones.
            say(&format!(
                "kernel {version}: {error:#}; reading the package lists anew"
            ));
            run_quietly("apt-get-update", setup::apt().arg("update"))?;
            download(version)?
        }
    };
    if let Some(package) = package {
        unpack(&package, &unpacked)?;
        fs::remove_file(package)?;
    }
    Ok(unpacked)
}

/// Downloads the package, unless it is unpacked already; returns it, and the folder to unpack it to.
fn download(version: &str) -> Result<(Option<PathBuf>, PathBuf)> {
    let package = newest(version)?;
    let unpacked = folder().join(&package);
    if unpacked.exists() {
        return Ok((None, unpacked));
    }
    say(&format!("kernel {version}: {package}"));
    while let Some(old) = downloaded(&package)? {
        fs::remove_file(old)?;
    }
    let mut apt = setup::apt();
    // As root, apt would change to a user that may not write here.
    apt.args(["-o", "APT::Sandbox::User=root", "download", &package]);
    run_quietly(
        &format!("apt-get-download-{version}"),
        apt.current_dir(folder()),
    )?;
    let file = downloaded(&package)?.context("the downloaded package is not there")?;
    Ok((Some(file), unpacked))
}

/// Returns the package that Debian's metapackage depends on.
fn newest(version: &str) -> Result<String> {
    let meta = match version {
        "6.1" => "linux-image-cloud-amd64".to_owned(), // Debian 12's own
        _ => format!("linux-image-{version}-cloud-amd64"),
    };
    let mut ask = Command::new("apt-cache");
    ask.env("LC_ALL", "C")
        .args(["depends", "--important", &meta]);
    let said = output(&mut ask)?;
    let depends = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "));
    let package = depends.with_context(|| format!("Debian has no package {meta}"))?;
    ensure!(
        package.starts_with(&format!("linux-image-{version}.")),
        "{meta} is {package}, and not {version}: this is not Debian 12"
    );
    Ok(package.to_owned())
}

/// Returns the file of a package in our folder.
fn downloaded(package: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&format!("{package}_")) && name.ends_with(".deb") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Returns the name of the folder for a package file; a file of another size or time gets another folder.
fn place(package: &Path) -> Result<String> {
    let name = package.file_stem().context("a package without a name")?;
    let meta = fs::metadata(package).with_context(|| package.display().to_string())?;
    let made = meta.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(format!("{}-{}-{made}", name.display(), meta.len()))
}

/// Unpacks a package to a folder, which appears complete or not at all.
fn unpack(package: &Path, to: &Path) -> Result<PathBuf> {
    if !to.exists() {
        let half = to.with_extension("half");
        if half.exists() {
            fs::remove_dir_all(&half)?;
        }
        fs::create_dir_all(&half)?;
        crate::command::run(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(package)
                .arg(&half),
        )?;
        fs::rename(&half, to)?;
    }
    Ok(to.to_owned())
}

/// Returns the folder of kernels and initramfs images.
pub(crate) fn folder() -> PathBuf {
    target().join("vm")
}
