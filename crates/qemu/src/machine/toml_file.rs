//! A specification from a TOML file, with errors that name file, line and key.

use std::ops::Range;

use toml::{Spanned, de::DeTable, de::DeValue};

use super::{Spec, SpecError};

/// Below this similarity two keys have nothing to do with each other.
const SIMILAR: f64 = 0.75;

/// What is wrong with a specification's file; one line, `FILE:LINE: KEY: what is wrong, what to do`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {problem}")]
pub struct SpecFileError {
    /// The file's name as the caller gave it.
    pub file: String,
    /// Counted from 1.
    pub line: usize,
    /// The key and what is wrong with it; the problem alone where the text isn't TOML.
    pub problem: String,
}

impl Spec {
    /// Reads a specification that a user wrote and checks it. `file` is only used in errors.
    ///
    /// # Errors
    /// The first thing that is wrong.
    ///
    /// ```
    /// use godwit_qemu::machine::Spec;
    /// let error = Spec::from_toml("name = \"web1\"\nmemroy = \"1G\"", "web1.toml").unwrap_err();
    /// assert_eq!(error.to_string(), "web1.toml:2: memroy: isn't known here; did you mean memory?");
    /// ```
    pub fn from_toml(text: &str, file: &str) -> Result<Self, SpecFileError> {
        let source = Source { text, file };
        let tree = DeTable::parse(text).map_err(|error| source.not_toml(&error))?;
        let spec: Self = toml::from_str(text).map_err(|error| source.not_a_spec(&tree, &error))?;
        if spec.adopted.is_some() {
            let error = SpecError::new("adopted", "is written by `vm adopt` only; leave it out");
            return Err(source.invalid(&tree, &error));
        }
        spec.validate().map_err(|error| source.invalid(&tree, &error))?;
        Ok(spec)
    }
}

struct Source<'a> {
    text: &'a str,
    file: &'a str,
}

impl Source<'_> {
    fn not_toml(&self, error: &toml::de::Error) -> SpecFileError {
        let at = error.span().unwrap_or(0..0).start;
        self.error(at, format!("isn't TOML: {}", one_line(error.message())))
    }

    fn not_a_spec(&self, tree: &Spanned<DeTable<'_>>, error: &toml::de::Error) -> SpecFileError {
        let span = error.span().unwrap_or(0..0);
        let message = one_line(error.message());
        let table = key_at(tree.get_ref(), &span);
        let names = backquoted(&message);
        if message.starts_with("unknown field") {
            let unknown = names.first().copied().unwrap_or_default();
            return self.error(span.start, format!("{}: {}", under(&table, unknown), suggestion(&names)));
        }
        if message.starts_with("missing field") {
            let missing = names.first().copied().unwrap_or_default();
            let problem = format!("{}: is missing; every machine needs it", under(&table, missing));
            return self.error(span.start, problem);
        }
        self.error(span.start, format!("{table}: {message}"))
    }

    fn invalid(&self, tree: &Spanned<DeTable<'_>>, error: &SpecError) -> SpecFileError {
        self.error(offset_of(tree.get_ref(), &error.key), error.to_string())
    }

    fn error(&self, offset: usize, problem: String) -> SpecFileError {
        let before = self.text.get(..offset).unwrap_or_default();
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        SpecFileError { file: self.file.to_owned(), line, problem }
    }
}

fn one_line(message: &str) -> String {
    message.lines().collect::<Vec<_>>().join("; ")
}

/// What a message of serde names between back quotes.
fn backquoted(message: &str) -> Vec<&str> {
    message.split('`').skip(1).step_by(2).collect()
}

fn suggestion(names: &[&str]) -> String {
    let Some((unknown, known)) = names.split_first() else { return "isn't known here".to_owned() };
    let known = known.iter().filter(|name| **name != "adopted");
    let scored = known.clone().map(|name| (strsim::jaro_winkler(unknown, name), *name));
    match scored.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((score, name)) if score >= SIMILAR => format!("isn't known here; did you mean {name}?"),
        _ => format!("isn't known here; known are {}", known.copied().collect::<Vec<_>>().join(", ")),
    }
}

fn under(table: &str, key: &str) -> String {
    if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
}

/// The innermost key whose value covers `span`, as `disk[0].path`; empty for the document.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> String {
    let covers =
        |value: &Spanned<DeValue<'_>>| value.span().start <= span.start && span.end <= value.span().end;
    let mut path = String::new();
    let mut inner = table.iter().find(|(_, value)| covers(value) || reaches(value, span));
    while let Some((key, value)) = inner {
        path = under(&path, key.get_ref());
        inner = match value.get_ref() {
            DeValue::Table(table) => table.iter().find(|(_, value)| covers(value)),
            DeValue::Array(array) => {
                let Some(index) = array.iter().position(|value| covers(value) || reaches(value, span)) else {
                    break;
                };
                path.push_str(&format!("[{index}]"));
                let table = array.get(index).and_then(|element| element.get_ref().as_table());
                table.and_then(|table| table.iter().find(|(_, value)| covers(value)))
            }
            _ => None,
        };
    }
    path
}

/// Whether something in a table or array lies around `span`; a `[table]`'s own span is only its header.
fn reaches(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    let covers = |other: Range<usize>| other.start <= span.start && span.end <= other.end;
    match value.get_ref() {
        DeValue::Table(table) => table
            .iter()
            .any(|(key, value)| covers(key.span()) || covers(value.span()) || reaches(value, span)),
        DeValue::Array(array) => array.iter().any(|value| covers(value.span()) || reaches(value, span)),
        _ => false,
    }
}

/// Where the key `disk[0].path` stands; as much of it as exists.
fn offset_of(table: &DeTable<'_>, key: &str) -> usize {
    let mut offset = 0;
    let mut table = Some(table);
    for part in key.split('.') {
        let (name, index) = match part.trim_end_matches(']').split_once('[') {
            Some((name, index)) => (name, index.parse::<usize>().ok()),
            None => (part, None),
        };
        let found = table.and_then(|table| table.iter().find(|(key, _)| key.get_ref() == name));
        let Some((key, value)) = found else { break };
        offset = key.span().start;
        let element = index.and_then(|index| value.get_ref().as_array().and_then(|array| array.get(index)));
        if let Some(element) = element {
            offset = element.span().start;
        }
        table = element.unwrap_or(value).get_ref().as_table();
    }
    offset
}
