//! apt, with sources and lists of its own.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::{
    programs::with_libraries,
    sources::{SourcesFile, backports},
};

const SOURCES_LIST: &str = "/etc/apt/sources.list";
const SOURCES_PARTS: &str = "/etc/apt/sources.list.d";

/// apt with the machine's sources and, where they can be derived, backports; what it fetches lives as long as this.
pub(super) struct Apt {
    directory: TempDir,
    backports_suite: Option<String>,
}

impl Apt {
    /// Fetches the lists of packages.
    pub(super) fn new() -> Result<Apt> {
        let directory = tempfile::Builder::new().prefix("godwit-apt-").tempdir()?;
        // apt fetches as a user of its own, who is to find its way in.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
        for name in ["lists/partial", "parts"] {
            std::fs::create_dir_all(directory.path().join(name))?;
        }
        let mut apt = Apt { directory, backports_suite: None };
        apt.gather_sources()?;
        apt.run("apt-get", &["--quiet=2", "update"])?;
        Ok(apt)
    }

    /// Installs packages, without what they merely recommend; QEMU from backports where there are some.
    pub(super) fn install(&self, packages: &[&str]) -> Result<()> {
        let (qemu, others): (Vec<&str>, Vec<&str>) =
            packages.iter().partition(|name| name.starts_with("qemu"));
        let install = ["--quiet=2", "--yes", "--no-install-recommends", "install"];
        if !others.is_empty() {
            self.run("apt-get", &[&install[..], &others].concat())?;
        }
        if !qemu.is_empty() {
            let release = self.backports_suite.as_ref().map(|suite| format!("--target-release={suite}"));
            let release: Vec<&str> = release.iter().map(String::as_str).collect();
            self.run("apt-get", &[&release[..], &install, &qemu].concat())?;
        }
        Ok(())
    }

    /// The first package that `package` depends on.
    pub(super) fn dependency_of(&self, package: &str) -> Result<String> {
        let listed = self.run("apt-cache", &["depends", "--no-recommends", "--no-suggests", package])?;
        let depends = listed.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(depends.with_context(|| format!("apt knows no package {package}"))?.trim().to_owned())
    }

    /// The newest version of `package` that begins with `beginning`; `None` if no source has one.
    pub(super) fn version_of(&self, package: &str, beginning: &str) -> Result<Option<String>> {
        Ok(newest(&self.run("apt-cache", &["madison", package])?, beginning))
    }

    /// `packages` and the packages of all libraries that they need.
    pub(super) fn with_libraries(&self, packages: &[&str]) -> Result<BTreeSet<String>> {
        let depends = ["depends", "--recurse", "--important"];
        Ok(with_libraries(packages, &self.run("apt-cache", &[&depends[..], packages].concat())?))
    }

    /// Downloads packages and unpacks them below `directory`, which is there as a whole or not at all.
    pub(super) fn unpack(&self, packages: &[&str], directory: &Path) -> Result<()> {
        self.run("apt-get", &[&["--quiet=2", "download"][..], packages].concat())?;
        let unfinished = directory.with_extension("unfinished");
        std::fs::create_dir_all(&unfinished)?;
        for file in std::fs::read_dir(self.directory.path())?.flatten().map(|entry| entry.path()) {
            if file.extension().is_some_and(|extension| extension == "deb") {
                unpack(&file, &unfinished)?;
                std::fs::remove_file(&file)?;
            }
        }
        std::fs::rename(&unfinished, directory)
            .with_context(|| format!("cannot put {} in its place", directory.display()))
    }

    /// Links the machine's sources into a directory of our own and adds backports beside them.
    fn gather_sources(&mut self) -> Result<()> {
        let parts = self.directory.path().join("parts");
        let own = std::fs::read_dir(SOURCES_PARTS).into_iter().flatten().flatten().map(|entry| entry.path());
        let own: Vec<PathBuf> = own.filter(|path| extension_of(path).is_some()).collect();
        for path in &own {
            symlink(path, parts.join(path.file_name().context("a source without a name")?))?;
        }
        let codename = codename(&std::fs::read_to_string("/etc/os-release")?);
        let Some(codename) = codename else { return Ok(()) };
        let all = std::iter::once(PathBuf::from(SOURCES_LIST)).chain(own);
        let derived = all.filter_map(|path| backports(&read(&path)?, &codename)).next();
        if let Some(file) = derived {
            std::fs::write(parts.join(format!("godwit-backports.{}", file.extension)), file.text)?;
            self.backports_suite = Some(format!("{codename}-backports"));
        }
        Ok(())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new(program)
            .args(self.options())
            .args(arguments)
            .current_dir(self.directory.path())
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {program}; this needs a system with apt"))?;
        if !output.status.success() {
            bail!(
                "{program} {} failed:\n{}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn options(&self) -> Vec<OsString> {
        let path = |name: &str| self.directory.path().join(name).into_os_string();
        let set = |key: &str, value: OsString| {
            let mut option = OsString::from(format!("--option={key}="));
            option.push(value);
            option
        };
        vec![
            set("Dir::Etc::sourceparts", path("parts")),
            set("Dir::State::lists", path("lists")),
            set("Dir::Cache::pkgcache", OsString::new()),
            set("Dir::Cache::srcpkgcache", OsString::new()),
        ]
    }
}

fn unpack(package: &Path, directory: &Path) -> Result<()> {
    let unpacked = Command::new("dpkg").arg("-x").arg(package).arg(directory).status();
    if !unpacked.context("cannot run dpkg")?.success() {
        bail!("dpkg -x {} failed", package.display());
    }
    Ok(())
}

fn read(path: &Path) -> Option<SourcesFile> {
    Some(SourcesFile { extension: extension_of(path)?, text: std::fs::read_to_string(path).ok()? })
}

fn extension_of(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_str()? {
        "sources" => Some("sources"),
        "list" => Some("list"),
        _ => None,
    }
}

/// Reads lines of `package | version | source`, the newest first.
fn newest(listing: &str, beginning: &str) -> Option<String> {
    let mut versions = listing.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    versions.find(|version| version.starts_with(beginning)).map(str::to_owned)
}

fn codename(os_release: &str) -> Option<String> {
    let line = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(line.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_found() {
        let listing = " q | 1:10.0.2+ds-2~bpo12+1 | http://m.example bookworm-backports/main amd64 Packages\n \
                       q | 1:7.2+dfsg-7+deb12u18+b3 | http://m.example bookworm/main amd64 Packages\n \
                       q | 1:7.2+dfsg-7+deb12u15 | http://s.example bookworm-security/main amd64 Packages\n";
        assert_eq!(newest(listing, "1:7.2").as_deref(), Some("1:7.2+dfsg-7+deb12u18+b3"));
        assert_eq!(newest(listing, "1:9."), None);
        assert_eq!(newest("N: no such package\n", "1:7.2"), None);
    }

    #[test]
    fn the_codename_is_read_with_and_without_quotes() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=bookworm\n").as_deref(), Some("bookworm"));
        assert_eq!(codename("VERSION_CODENAME=\"trixie\"\n").as_deref(), Some("trixie"));
        assert_eq!(codename("ID=arch\n"), None);
    }
}
