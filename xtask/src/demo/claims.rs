//! What a demo claims, and whether it holds.

use std::{fmt::Write, path::Path};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use super::screen::Screen;

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

    /// Prints all of them, and writes them to a file if one is asked for. `played` is how the demo itself ended.
    ///
    /// # Errors
    /// How the demo ended, or that a claim doesn't hold.
    pub(super) fn conclude(&self, played: Result<()>, screen: &Screen, json: Option<&Path>) -> Result<()> {
        print!("\n{}", self.render());
        let broken = self.broken();
        if let Some(path) = json {
            let seconds = screen.elapsed().as_secs_f64();
            let holds = broken == 0 && played.is_ok();
            let account = json!({ "holds": holds, "seconds": seconds, "claims": self });
            std::fs::write(path, serde_json::to_string_pretty(&account)? + "\n")
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        played?;
        if broken > 0 {
            bail!("claims that don't hold: {broken}");
        }
        Ok(())
    }

    /// How many don't hold.
    fn broken(&self) -> usize {
        self.0.iter().filter(|claim| !claim.holds).count()
    }

    /// A table for people.
    fn render(&self) -> String {
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
