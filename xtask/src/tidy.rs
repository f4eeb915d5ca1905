//! What rustfmt and clippy don't know about this house.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use godwit_sim::guest_image::workspace;

use crate::chaos::Fault;

/// The most lines of a source file.
const MAX_LINES: usize = 800;
/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 4] = ["util", "utils", "common", "helpers"];
/// The table of what can fail.
const FAILURES: &str = "docs/failures.md";
const MAP: &str = "ARCHITECTURE.md";
const TABLE_HEADER: &str = "| crate | directory |";

/// Checks the map of the crates against the crates, and all sources for length and names.
///
/// # Errors
/// Names everything that is wrong.
pub(crate) fn run() -> Result<()> {
    let metadata = MetadataCommand::new().current_dir(workspace()).no_deps().exec()?;
    let map = std::fs::read_to_string(workspace().join(MAP)).context("cannot read ARCHITECTURE.md")?;
    let mut faults = map_faults(&drawn(&map), &built(&metadata));
    for directory in ["crates", "xtask"] {
        for file in sources_below(&workspace().join(directory))? {
            let lines = std::fs::read_to_string(&file)?.lines().count();
            faults.extend(file_faults(file.strip_prefix(workspace())?, lines));
        }
    }
    faults.extend(failures_faults()?);
    if faults.is_empty() {
        return Ok(());
    }
    bail!("{}", faults.join("\n"))
}

/// What docs/failures.md names as tests and isn't one: no function of that name, no kind of chaos.
fn failures_faults() -> Result<Vec<String>> {
    let table = std::fs::read_to_string(workspace().join(FAILURES))?;
    let mut sources = String::new();
    for directory in ["crates", "xtask/src/chaos"] {
        for file in sources_below(&workspace().join(directory))? {
            sources.push_str(&std::fs::read_to_string(file)?);
        }
    }
    let is_test = |name: &str| sources.contains(&format!("fn {name}()"));
    let is_kind = |name: &str| Fault::ALL.iter().any(|fault| fault.to_string() == name);
    let named = tests_named(&table).into_iter();
    let unknown = named.filter(|name| !is_test(name) && !is_kind(name));
    Ok(unknown.map(|name| format!("{FAILURES}: there is no test and no kind of chaos `{name}`")).collect())
}

/// The names in backquotes in the last column of every table.
fn tests_named(text: &str) -> BTreeSet<String> {
    let rows = text.lines().filter(|line| line.starts_with('|'));
    let cells = rows.filter_map(|row| row.trim_end_matches('|').rsplit('|').next());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// Of a crate: its directory and the workspace's crates that it depends on, those for tests only left out.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directory: String,
    dependencies: BTreeSet<String>,
}

type Map = BTreeMap<String, Place>;

/// The table of crates as the map has it.
fn drawn(map: &str) -> Map {
    let table = map.lines().skip_while(|line| !line.starts_with(TABLE_HEADER)).skip(2);
    let rows = table.take_while(|line| line.starts_with('|'));
    let cells = rows.filter_map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, directory, _, dependencies] = cells[..] else { return None };
        let dependencies = dependencies.split(',').map(unquoted).filter(|name| name != "–").collect();
        Some((unquoted(name), Place { directory: unquoted(directory), dependencies }))
    });
    cells.collect()
}

fn unquoted(cell: &str) -> String {
    cell.trim().trim_matches('`').to_owned()
}

/// The same, as cargo has it.
fn built(metadata: &Metadata) -> Map {
    let packages = metadata.workspace_packages();
    let members: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let place = |package: &&cargo_metadata::Package| {
        let needed = package.dependencies.iter().filter(|needed| needed.kind != DependencyKind::Development);
        let dependencies =
            needed.map(|needed| needed.name.clone()).filter(|name| members.contains(name.as_str()));
        let manifest = package.manifest_path.strip_prefix(&metadata.workspace_root);
        let directory =
            manifest.ok().and_then(|path| path.parent()).map(ToString::to_string).unwrap_or_default();
        (package.name.to_string(), Place { directory, dependencies: dependencies.collect() })
    };
    packages.iter().map(place).collect()
}

fn map_faults(drawn: &Map, built: &Map) -> Vec<String> {
    let names: BTreeSet<&String> = drawn.keys().chain(built.keys()).collect();
    let fault = |name: &&String| match (drawn.get(*name), built.get(*name)) {
        (Some(drawn), Some(built)) if drawn == built => None,
        (Some(drawn), Some(built)) => {
            Some(format!("{MAP}: {name} is drawn as {drawn:?} but built as {built:?}"))
        }
        (None, _) => Some(format!("{MAP}: {name} is missing")),
        (_, None) => Some(format!("{MAP}: there is no crate {name}")),
    };
    names.iter().filter_map(fault).collect()
}

fn file_faults(file: &Path, lines: usize) -> Vec<String> {
    let mut faults = Vec::new();
    if lines > MAX_LINES {
        faults.push(format!("{}: {lines} lines, more than {MAX_LINES}", file.display()));
    }
    let names = file.iter().filter_map(|part| part.to_str()).map(|part| part.trim_end_matches(".rs"));
    for name in names.filter(|name| EMPTY_NAMES.contains(name)) {
        faults.push(format!("{}: {name} says nothing about what is inside", file.display()));
    }
    faults
}

fn sources_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            sources.extend(sources_below(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(path);
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP_TEXT: &str = "# Map\n\n| crate | directory | what it is for | depends on |\n|---|---|---|---|\n\
                            | `a` | crates/a | first | – |\n| `b` | crates/b | second | `a`, `c` |\n\n| `d` | x | y | z |\n";

    fn place(directory: &str, dependencies: &[&str]) -> Place {
        let dependencies = dependencies.iter().map(|name| (*name).to_owned()).collect();
        Place { directory: directory.into(), dependencies }
    }

    #[test]
    fn the_table_is_read_and_nothing_below_it() {
        let expected = [("a", place("crates/a", &[])), ("b", place("crates/b", &["a", "c"]))];
        assert_eq!(drawn(MAP_TEXT), expected.map(|(name, place)| (name.to_owned(), place)).into());
    }

    #[test]
    fn whatever_differs_is_named() {
        let built = [("a", place("crates/a", &["b"])), ("c", place("crates/c", &[]))];
        let faults =
            map_faults(&drawn(MAP_TEXT), &built.map(|(name, place)| (name.to_owned(), place)).into());
        let about: Vec<&str> = faults.iter().filter_map(|fault| fault.split_whitespace().nth(1)).collect();
        assert_eq!(about, ["a", "there", "c"]);
    }

    #[test]
    fn long_files_and_empty_names_are_faults() {
        assert!(file_faults(Path::new("crates/a/src/link.rs"), MAX_LINES).is_empty());
        assert_eq!(file_faults(Path::new("crates/a/src/utils.rs"), MAX_LINES + 1).len(), 2);
        assert_eq!(file_faults(Path::new("crates/a/src/common/mod.rs"), 1).len(), 1);
    }
}
