//! Real programs as guests' loads.
//!
//! They come from the distribution's packages, which `cargo xtask bench` unpacks (not installs) under
//! `target/guest/packages`. An archive of a program, the libraries it needs and a script is laid on top of the plain
//! initramfs: the kernel unpacks both (Documentation/driver-api/early-userspace/buffer-format).

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use super::{GuestImageError, directory, files_below, newc::Archive};

/// Where Debian keeps its libraries, before and after it merged `/lib` with `/usr/lib`.
const LIBRARY_DIRECTORIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";
/// For programs that ask who they are.
const ACCOUNTS: [(&str, &str); 2] =
    [("etc/passwd", "root:x:0:0::/:/bin/sh\nnobody:x:65534:0::/:/bin/sh\n"), ("etc/group", "root:x:0:\n")];

/// A program that a guest runs instead of the workloads of its own.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    /// What benches call it.
    pub name: &'static str,
    /// The packages it is in; those of libraries follow from them.
    pub packages: &'static [&'static str],
    /// Whether it answers requests for `/0` to `/255`, see [`crate::web_client`].
    pub serves_web: bool,
    executables: &'static [&'static str],
    /// Directories of the packages that come along as they are.
    trees: &'static [&'static str],
    script: &'static str,
    /// Path in the guest, and content.
    settings: &'static [(&'static str, &'static str)],
}

/// A database under writes, a store of keys and values, a compressor, and a web server.
pub const PROGRAMS: [Program; 4] = [
    Program {
        name: "sqlite",
        packages: &["sqlite3"],
        serves_web: false,
        executables: &["usr/bin/sqlite3"],
        trees: &[],
        script: include_str!("programs/sqlite.sh"),
        settings: &[],
    },
    Program {
        name: "redis",
        packages: &["redis-server", "redis-tools"],
        serves_web: false,
        executables: &["usr/bin/redis-server", "usr/bin/redis-cli"],
        trees: &[],
        script: include_str!("programs/redis.sh"),
        settings: &[],
    },
    Program {
        name: "compress",
        packages: &["xz-utils"],
        serves_web: false,
        executables: &["usr/bin/xz"],
        trees: &[],
        script: include_str!("programs/compress.sh"),
        settings: &[],
    },
    Program {
        name: "web",
        packages: &["nginx"],
        serves_web: true,
        executables: &["usr/sbin/nginx"],
        trees: &[],
        script: include_str!("programs/web.sh"),
        settings: &[("programs/nginx.conf", include_str!("programs/nginx.conf"))],
    },
];

/// A build that several guests do together: preprocessed and handed out by the first of them, compiled by all.
pub const BUILD: Program = Program {
    name: "build",
    packages: &["distcc", "tcc", "musl-dev", "libcurl4-doc", "libcurl4-openssl-dev"],
    serves_web: false,
    executables: &["usr/bin/distcc", "usr/bin/distccd", "usr/bin/tcc"],
    trees: &[
        "usr/include/x86_64-linux-gnu/curl",
        "usr/include/x86_64-linux-musl",
        "usr/lib/x86_64-linux-gnu/tcc/include",
        "usr/share/doc/libcurl4/examples",
    ],
    script: include_str!("programs/build.sh"),
    settings: &[],
};

/// Where the programs' packages are to be unpacked.
pub fn packages_directory() -> PathBuf {
    directory().join("packages")
}

impl Program {
    /// Those that a guest runs by itself, and the [`BUILD`].
    pub fn all() -> impl Iterator<Item = &'static Program> {
        const { &PROGRAMS }.iter().chain([const { &BUILD }])
    }

    /// The program of that name.
    pub fn named(name: &str) -> Option<&'static Program> {
        Program::all().find(|program| program.name == name)
    }

    /// Whether its packages are unpacked.
    pub fn is_unpacked(&self) -> bool {
        self.executables.iter().all(|path| packages_directory().join(path).exists())
    }

    /// What the guest runs, again and again: it prints a line for each piece of work.
    pub fn command(&self) -> String {
        format!("/{}", self.script_path())
    }

    fn script_path(&self) -> String {
        format!("programs/{}", self.name)
    }

    /// The archive to lay on top of the plain initramfs.
    pub(super) fn archive(&self) -> Result<Vec<u8>, GuestImageError> {
        let mut contents = BTreeMap::new();
        for (name, source) in self.files_of_packages()? {
            contents.insert(name, std::fs::read(&source).map_err(GuestImageError::io(&source))?);
        }
        for (name, content) in ACCOUNTS.iter().chain(self.settings) {
            contents.insert((*name).to_owned(), content.as_bytes().to_owned());
        }
        contents.insert(self.script_path(), self.script.as_bytes().to_owned());
        let mut archive = Archive::default();
        directories_above(contents.keys()).iter().for_each(|name| archive.directory(name));
        contents.iter().for_each(|(name, content)| archive.file(name, 0o755, content));
        Ok(archive.finish())
    }

    /// By their paths in the guest, where they are here.
    fn files_of_packages(&self) -> Result<BTreeMap<String, PathBuf>, GuestImageError> {
        let packages = packages_directory();
        let mut files = BTreeMap::new();
        for path in self.executables {
            files.extend(libraries_of(&packages, path)?);
            files.insert((*path).to_owned(), packages.join(path));
        }
        for tree in self.trees.iter().map(|tree| packages.join(tree)) {
            let below = files_below(&tree).map_err(GuestImageError::io(&tree))?;
            let name = |file: &Path| Some(file.strip_prefix(&packages).ok()?.to_str()?.to_owned());
            files.extend(below.into_iter().filter_map(|file| Some((name(&file)?, file))));
        }
        Ok(files)
    }
}

/// All directories above files, each after the one that it is in.
fn directories_above<'a>(files: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let above = files.flat_map(|file| Path::new(file).ancestors().skip(1));
    above.filter_map(Path::to_str).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The libraries that a program needs and its loader, by the paths at which it looks for them.
fn libraries_of(packages: &Path, program: &str) -> Result<Vec<(String, PathBuf)>, GuestImageError> {
    let directories = LIBRARY_DIRECTORIES.map(|directory| packages.join(directory));
    let missing = |library: &str| GuestImageError::NoLibrary {
        program: program.to_owned(),
        library: library.to_owned(),
    };
    let loader = directories.iter().map(|directory| directory.join(LOADER)).find(|path| path.exists());
    let loader = loader.ok_or_else(|| missing(LOADER))?;
    let mut search = OsString::from(&directories[0]);
    search.push(":");
    search.push(&directories[1]);
    // The programs' own loader knows best; it lists, and runs nothing.
    let output = Command::new(&loader)
        .args(["--inhibit-cache", "--library-path"])
        .arg(search)
        .arg("--list")
        .arg(packages.join(program))
        .output()
        .map_err(GuestImageError::io(&loader))?;
    let mut libraries = vec![(format!("lib64/{LOADER}"), loader)];
    for (name, path) in listed(&String::from_utf8_lossy(&output.stdout)) {
        // One that it found on this machine isn't in the packages.
        let path = path.filter(|path| path.starts_with(packages)).ok_or_else(|| missing(&name))?;
        libraries.push((format!("{}/{name}", LIBRARY_DIRECTORIES[0]), path));
    }
    Ok(libraries)
}

/// Reads what the loader lists: names of libraries, and where each was found. The loader itself is left out.
fn listed(output: &str) -> Vec<(String, Option<PathBuf>)> {
    let found = output.lines().filter_map(|line| line.trim().split_once(" => "));
    let libraries = found.filter(|(name, _)| !name.starts_with('/'));
    let place = |place: &str| place.split_once(" (0x").map(|(path, _)| PathBuf::from(path));
    libraries.map(|(name, at)| (name.to_owned(), place(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_loader_lists_is_read() {
        let output = "\tlinux-vdso.so.1 (0x00007ffe1b5f2000)\n\
                      \tlibz.so.1 => /packages/lib/x86_64-linux-gnu/libz.so.1 (0x00007f3b16a00000)\n\
                      \tlibpcre2-8.so.0 => not found\n\
                      \t/lib64/ld-linux-x86-64.so.2 => /packages/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 (0x00007f)\n";
        let path = PathBuf::from("/packages/lib/x86_64-linux-gnu/libz.so.1");
        assert_eq!(listed(output), [("libz.so.1".into(), Some(path)), ("libpcre2-8.so.0".into(), None)]);
    }

    #[test]
    fn a_directory_comes_before_what_is_in_it() {
        let files = ["etc/passwd", "usr/bin/tcc", "init"].map(str::to_owned);
        let above: Vec<String> = directories_above(files.iter()).into_iter().collect();
        assert_eq!(above, ["etc", "usr", "usr/bin"]);
    }

    #[test]
    fn programs_have_names_of_their_own_and_scripts_that_a_shell_understands() {
        for program in Program::all() {
            assert_eq!(Program::named(program.name), Some(program));
            let checked = Command::new("sh").args(["-n", "-c", program.script]).status();
            assert!(checked.is_ok_and(|status| status.success()), "{}", program.name);
        }
        assert_eq!(Program::named("word"), None);
    }
}
