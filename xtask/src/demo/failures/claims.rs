//! What the demo claims, and whether it holds.

use std::fmt::Write;

use serde::Serialize;

/// One claim, as `--json` writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Claim {
    pub(super) claim: &'static str,
    /// What was seen.
    pub(super) value: String,
    pub(super) holds: bool,
}

/// All claims, in the order in which they were made.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub(super) struct Claims(Vec<Claim>);

impl Claims {
    pub(super) fn add(&mut self, claim: &'static str, holds: bool, value: impl Into<String>) {
        self.0.push(Claim { claim, value: value.into(), holds });
    }

    /// A claim that holds if there is something to show for it.
    pub(super) fn add_shown(&mut self, claim: &'static str, shown: Result<String, String>) {
        let holds = shown.is_ok();
        self.add(claim, holds, shown.unwrap_or_else(|why| why));
    }

    /// How many don't hold.
    pub(super) fn broken(&self) -> usize {
        self.0.iter().filter(|claim| !claim.holds).count()
    }

    /// A table for people.
    pub(super) fn render(&self) -> String {
        let widest = self.0.iter().map(|claim| claim.claim.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for Claim { claim, value, holds } in &self.0 {
            let verdict = if *holds { "holds" } else { "BROKEN" };
            let _ = writeln!(text, "{verdict:<7} {claim:<widest$}  {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_claim_stands_out_and_counts() {
        let mut claims = Claims::default();
        claims.add("one copy runs", true, "at b");
        claims.add_shown("the counter", Err("went back".into()));
        assert_eq!(claims.broken(), 1);
        assert_eq!(claims.render(), "holds   one copy runs  at b\nBROKEN  the counter    went back\n");
    }
}
