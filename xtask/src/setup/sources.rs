//! Derives where backports are from where the release is.
//!
//! The mirror, its key and its options are the machine's own; only the suite is changed. Both of apt's formats are
//! understood: one line an entry (`*.list`) and stanzas (`*.sources`, deb822).

/// A file of sources, to be read by apt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourcesFile {
    /// `list` or `sources`: apt tells the format by it.
    pub(super) extension: &'static str,
    pub(super) text: String,
}

/// The source of `<codename>-backports` that belongs to the first entry for `codename` itself, if the file has one.
pub(super) fn backports(file: &SourcesFile, codename: &str) -> Option<SourcesFile> {
    let text = match file.extension {
        "sources" => file.text.split("\n\n").find_map(|stanza| from_stanza(stanza, codename))?,
        _ => file.text.lines().find_map(|line| from_line(line, codename))?,
    };
    Some(SourcesFile { extension: file.extension, text })
}

fn from_stanza(stanza: &str, codename: &str) -> Option<String> {
    let lines: Vec<&str> = stanza.lines().filter(|line| !line.starts_with('#')).collect();
    let field = |name: &str| {
        let lower =
            |line: &&&str| line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
        lines.iter().find(lower).and_then(|line| line.split_once(':')).map(|(_, value)| value.trim())
    };
    let has =
        |name: &str, word: &str| field(name).is_some_and(|value| value.split_whitespace().any(|w| w == word));
    if !has("Types", "deb") || !has("Suites", codename) || has("Enabled", "no") {
        return None;
    }
    let rewritten = lines.iter().map(|line| match line.split_once(':') {
        Some((key, _)) if key.eq_ignore_ascii_case("Suites") => format!("Suites: {codename}-backports\n"),
        Some((key, _)) if key.eq_ignore_ascii_case("Types") => "Types: deb\n".into(),
        _ => format!("{line}\n"),
    });
    Some(rewritten.collect())
}

fn from_line(line: &str, codename: &str) -> Option<String> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(options, rest)| (format!("[{options}] "), rest))?,
        None => (String::new(), rest),
    };
    let mut words = rest.split_whitespace();
    let (address, suite) = (words.next()?, words.next()?);
    let components = words.take_while(|word| !word.starts_with('#')).collect::<Vec<_>>().join(" ");
    (suite == codename).then(|| format!("deb {options}{address} {codename}-backports {components}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn derive(extension: &'static str, text: &str) -> Option<String> {
        backports(&SourcesFile { extension, text: text.into() }, "bookworm").map(|file| file.text)
    }

    #[test]
    fn a_stanza_keeps_all_but_its_suites() {
        let text = "Types: deb deb-src\n# a note\nURIs: http://mirror.example/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/a.gpg\n\n\
                    Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n";
        assert_eq!(
            derive("sources", text).unwrap(),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/a.gpg\n"
        );
    }

    #[test]
    fn a_key_within_a_stanza_comes_along() {
        let text = "Types: deb\nURIs: http://m.example\nSuites: bookworm\nComponents: main\nSigned-By:\n \
                    -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY\n";
        assert!(derive("sources", text).unwrap().ends_with("BLOCK-----\n .\n mDMEY\n"));
    }

    #[test]
    fn a_line_keeps_its_options() {
        let text = "# deb http://old.example bookworm main\ndeb-src http://m.example bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm main contrib # here\n";
        assert_eq!(
            derive("list", text).unwrap(),
            "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian bookworm-backports main contrib\n"
        );
        assert_eq!(
            derive("list", "deb http://m.example bookworm main\n").unwrap(),
            "deb http://m.example bookworm-backports main\n"
        );
    }

    #[test]
    fn other_suites_and_disabled_ones_are_left_alone() {
        assert_eq!(derive("list", "deb http://m.example bookworm-security main\n"), None);
        assert_eq!(derive("list", "deb [broken\ndeb\n"), None);
        let disabled =
            "Enabled: no\nTypes: deb\nURIs: http://m.example\nSuites: bookworm\nComponents: main\n";
        assert_eq!(derive("sources", disabled), None);
        assert_eq!(derive("sources", "Types: deb-src\nSuites: bookworm\n"), None);
    }
}
