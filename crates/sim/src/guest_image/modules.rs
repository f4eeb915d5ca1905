//! Kernel modules, in an order in which each finds what it needs.
//!
//! A module names what it needs in its section `.modinfo`, as `depends=a,b`. Loading in another order fails, and
//! says so only in the kernel's log.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use super::{GuestImageError, files_below};

/// A module, uncompressed.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// The modules `wanted` and all they need, those that are needed first.
pub(super) fn closure(directory: &Path, wanted: &[&str]) -> Result<Vec<Module>, GuestImageError> {
    let files = files_below(directory).map_err(GuestImageError::io(directory))?;
    let available: BTreeMap<String, PathBuf> =
        files.into_iter().filter_map(|path| Some((module_name(&path)?, path))).collect();
    let (mut ordered, mut seen) = (Vec::new(), BTreeSet::new());
    for name in wanted {
        visit(name, &available, &mut seen, &mut ordered)?;
    }
    Ok(ordered)
}

fn visit(
    name: &str,
    available: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    ordered: &mut Vec<Module>,
) -> Result<(), GuestImageError> {
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let path = available.get(name).ok_or_else(|| GuestImageError::NoModule(name.to_owned()))?;
    let bytes = uncompressed(path)?;
    for needed in needs(&bytes) {
        visit(&needed, available, seen, ordered)?;
    }
    ordered.push(Module { name: name.to_owned(), bytes });
    Ok(())
}

/// `virtio-rng.ko.xz` holds the module `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn uncompressed(path: &Path) -> Result<Vec<u8>, GuestImageError> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return std::fs::read(path).map_err(GuestImageError::io(path));
    }
    let output = Command::new("xz").arg("-dc").arg(path).output().map_err(GuestImageError::io(path))?;
    Ok(output.stdout)
}

fn needs(module: &[u8]) -> Vec<String> {
    let strings = module.split(|byte| *byte == 0);
    let named = strings.filter_map(|string| string.strip_prefix(b"depends="));
    let names = named.flat_map(|list| list.split(|byte| *byte == b','));
    names
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, depends: &str| {
            let content = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            std::fs::write(directory.path().join(file), content).unwrap();
        };
        write("net.ko", "fail-over,ring");
        write("fail-over.ko", "");
        write("ring.ko", "base");
        write("base.ko", "");
        let modules = closure(directory.path(), &["ring", "net"]).unwrap();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["base", "ring", "fail_over", "net"]);
        let missing = closure(directory.path(), &["blk"]).unwrap_err();
        assert!(matches!(missing, GuestImageError::NoModule(name) if name == "blk"));
    }
}
