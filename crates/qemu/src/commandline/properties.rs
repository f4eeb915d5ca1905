//! The comma lists and JSON objects that QEMU's options take as values.

use std::fmt;

use serde_json::Value;

/// The value of an option as a list of keys and values, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Properties(Vec<(String, String)>);

/// A value that isn't such a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PropertiesError {
    #[error("\"{0}\" has no value; write {0}=on or {0}=off")]
    NoValue(String),
    #[error("isn't JSON")]
    NotJson,
    #[error("{0} is null, which can't be written on a command line")]
    Null(String),
}

impl Properties {
    /// Cuts `key=value,key=value`; a doubled comma is one that belongs to the value. A first value without a key gets
    /// `implied`. A JSON object becomes the list that means the same (`file.driver=...`).
    pub(crate) fn parse(text: &str, implied: &str) -> Result<Self, PropertiesError> {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let mut properties = Self::default();
        for part in split(text) {
            match part.split_once('=') {
                Some((key, value)) => properties.0.push((key.to_owned(), value.to_owned())),
                None if properties.0.is_empty() && !implied.is_empty() => {
                    properties.0.push((implied.to_owned(), part));
                }
                // `nowait` is an old way to write `wait=off`; which of the two a word means depends on the option.
                None if part.starts_with("no") => return Err(PropertiesError::NoValue(part)),
                None => properties.0.push((part, "on".to_owned())),
            }
        }
        Ok(properties)
    }

    fn from_json(text: &str) -> Result<Self, PropertiesError> {
        let value: Value = serde_json::from_str(text).map_err(|_| PropertiesError::NotJson)?;
        let mut properties = Self::default();
        properties.flatten("", &value)?;
        Ok(properties)
    }

    fn flatten(&mut self, key: &str, value: &Value) -> Result<(), PropertiesError> {
        let under = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
        match value {
            Value::Null => return Err(PropertiesError::Null(key.to_owned())),
            Value::Bool(on) => self.0.push((key.to_owned(), if *on { "on" } else { "off" }.to_owned())),
            Value::Number(number) => self.0.push((key.to_owned(), number.to_string())),
            Value::String(text) => self.0.push((key.to_owned(), text.clone())),
            Value::Array(elements) => {
                for (index, element) in elements.iter().enumerate() {
                    self.flatten(&under(&index.to_string()), element)?;
                }
            }
            Value::Object(members) => {
                for (name, member) in members {
                    self.flatten(&under(name), member)?;
                }
            }
        }
        Ok(())
    }

    /// The value of `key`; the last, as QEMU sees it.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Gives `key` this value, in its old place or at the end.
    pub(crate) fn set(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
    }

    /// Takes `key` out; gives the value that it had.
    pub(crate) fn remove(&mut self, key: &str) -> Option<String> {
        let found = self.get(key).map(str::to_owned);
        self.0.retain(|(name, _)| name != key);
        found
    }

    /// A key that stands there more than once.
    pub(crate) fn repeated(&self) -> Option<&str> {
        let (mut seen, mut keys) =
            (std::collections::HashSet::new(), self.0.iter().map(|(key, _)| key.as_str()));
        keys.find(|key| !seen.insert(*key))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut String)> {
        self.0.iter_mut().map(|(key, value)| (key.as_str(), value))
    }
}

impl fmt::Display for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (key, value)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{key}={}", escape(value))?;
        }
        Ok(())
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Properties {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self(entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }
}

/// A value as it may stand in a comma list.
pub(crate) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// Splits at single commas and turns double ones into one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(letter);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(text: &str) -> Properties {
        Properties::parse(text, "driver").unwrap()
    }

    #[test]
    fn the_first_value_has_an_implied_key() {
        assert_eq!(list("e1000,id=a"), [("driver", "e1000"), ("id", "a")].into_iter().collect());
        assert_eq!(list("driver=e1000,multi"), [("driver", "e1000"), ("multi", "on")].into_iter().collect());
        assert!(Properties::parse("socket,nowait", "backend").is_err());
    }

    #[test]
    fn json_means_the_same() {
        let json =
            r#"{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"/a,b"},"x":[1,"c"]}"#;
        let expected = "driver=qcow2,read-only=on,file.driver=file,file.filename=/a,,b,x.0=1,x.1=c";
        let mut got: Vec<_> = list(json).0;
        let mut want: Vec<_> = list(expected).0;
        got.sort();
        want.sort();
        assert_eq!(got, want);
        assert!(Properties::parse(r#"{"backing":null}"#, "driver").is_err());
    }

    proptest! {
        #[test]
        fn a_value_never_becomes_two(entries in proptest::collection::vec(("[a-z][a-z.-]{0,8}", "\\PC*"), 1..6)) {
            let properties: Properties = entries.into_iter().collect();
            prop_assert_eq!(Properties::parse(&properties.to_string(), "implied"), Ok(properties));
        }
    }
}
