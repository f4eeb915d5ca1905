//! The packages of the programs that benches run in guests, and of the libraries that they need.

use std::collections::{BTreeMap, BTreeSet};

/// Packages by name, and what each depends on.
type Dependencies<'a> = BTreeMap<&'a str, Vec<&'a str>>;

/// `packages` and all packages of libraries below them, from what `apt-cache depends --recurse` says. Anything else that
/// they depend on serves their installation.
pub(super) fn with_libraries(packages: &[&str], listing: &str) -> BTreeSet<String> {
    let dependencies = read(listing);
    let mut wanted = BTreeSet::new();
    let mut open: Vec<&str> = packages.to_vec();
    while let Some(package) = open.pop() {
        if wanted.insert(package.to_owned()) {
            let needed = dependencies.get(package).into_iter().flatten();
            open.extend(needed.filter(|name| holds_library(name)));
        }
    }
    wanted
}

/// A package's name stands at the start of a line; what it depends on, and what else would do, on lines below.
fn read(listing: &str) -> Dependencies<'_> {
    let mut dependencies = Dependencies::new();
    let mut package = "";
    for line in listing.lines() {
        if !line.starts_with([' ', '|']) {
            package = line;
        } else if let Some((_, needed)) = line.split_once("Depends: ") {
            dependencies.entry(package).or_default().push(needed);
        }
    }
    dependencies
}

/// Whether it is a library by its name, not a virtual package (`<…>`) and not of another architecture (`…:…`).
fn holds_library(package: &str) -> bool {
    (package.starts_with("lib") || package.starts_with("zlib")) && !package.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_come_along_and_nothing_else() {
        let listing = "server\n  Depends: libc6\n |Depends: libssl3\n  Depends: libssl1\n  Depends: <libssl-any>\n    \
                       libssl3\n  PreDepends: init\nlibc6\n  Depends: libgcc-s1\nlibgcc-s1\n  Depends: libc6\ninit\n  \
                       Depends: libselinux1\nlibssl3\n  Depends: zlib1g\n  Depends: libc6:i386\n";
        let wanted = with_libraries(&["server"], listing);
        let expected = ["libc6", "libgcc-s1", "libssl1", "libssl3", "server", "zlib1g"];
        assert_eq!(wanted.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    }
}
