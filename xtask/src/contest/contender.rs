//! Everybody who can move a guest.

use anyhow::{Context, Result, bail};

use super::{
    GODWIT, Outcome, Stage, godwit,
    plain_qemu::{self, Way},
};

/// One way to move a guest, under the name that tables give it.
#[derive(Debug)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    means: Means,
}

#[derive(Debug)]
enum Means {
    /// godwit, with these options for `migrate`.
    Godwit(&'static [&'static str]),
    /// QEMU alone.
    Qemu(Way),
}

const ALL: [Contender; 13] = [
    Contender { name: GODWIT, means: Means::Godwit(&[]) },
    Contender { name: "godwit-smart-stop", means: Means::Godwit(&["--stop-policy", "smart-stop"]) },
    Contender { name: "godwit-inline", means: Means::Godwit(&["--inline"]) },
    Contender { name: "godwit-connections", means: Means::Godwit(&["--connections", "2"]) },
    Contender { name: "qemu-precopy", means: Means::Qemu(plain_qemu::PRECOPY) },
    Contender { name: "qemu-auto-converge", means: Means::Qemu(plain_qemu::AUTO_CONVERGE) },
    Contender { name: "qemu-xbzrle", means: Means::Qemu(plain_qemu::XBZRLE) },
    Contender { name: "qemu-xbzrle-downtime", means: Means::Qemu(plain_qemu::XBZRLE_DOWNTIME) },
    Contender { name: "qemu-multifd", means: Means::Qemu(plain_qemu::MULTIFD) },
    Contender { name: "qemu-multifd-zstd", means: Means::Qemu(plain_qemu::MULTIFD_ZSTD) },
    Contender { name: "qemu-zstd-pipe", means: Means::Qemu(plain_qemu::ZSTD_PIPE) },
    Contender { name: "qemu-xbzrle-zstd-pipe", means: Means::Qemu(plain_qemu::XBZRLE_ZSTD_PIPE) },
    Contender { name: "qemu-postcopy", means: Means::Qemu(plain_qemu::POSTCOPY) },
];

/// godwit with each technique alone, and with each left out (CloudNet, Figure 6.9).
const TECHNIQUES: [Contender; 10] = [
    Contender {
        name: "godwit-zero-alone",
        means: Means::Godwit(&["--without", "reference,sub-block,delta,compress"]),
    },
    Contender {
        name: "godwit-reference-alone",
        means: Means::Godwit(&["--without", "zero,sub-block,delta,compress"]),
    },
    Contender {
        name: "godwit-sub-block-alone",
        means: Means::Godwit(&["--without", "zero,reference,delta,compress"]),
    },
    Contender {
        name: "godwit-delta-alone",
        means: Means::Godwit(&["--without", "zero,reference,sub-block,compress"]),
    },
    Contender {
        name: "godwit-compress-alone",
        means: Means::Godwit(&["--without", "zero,reference,sub-block,delta"]),
    },
    Contender { name: "godwit-no-zero", means: Means::Godwit(&["--without", "zero"]) },
    Contender { name: "godwit-no-reference", means: Means::Godwit(&["--without", "reference"]) },
    Contender { name: "godwit-no-sub-block", means: Means::Godwit(&["--without", "sub-block"]) },
    Contender { name: "godwit-no-delta", means: Means::Godwit(&["--without", "delta"]) },
    Contender { name: "godwit-no-compress", means: Means::Godwit(&["--without", "compress"]) },
];

impl Contender {
    /// Everybody but the techniques, in the order in which tables list them.
    pub(crate) fn all() -> impl Iterator<Item = &'static Contender> {
        const { &ALL }.iter()
    }

    /// godwit's techniques, each alone and each left out.
    pub(crate) fn techniques() -> impl Iterator<Item = &'static Contender> {
        const { &TECHNIQUES }.iter()
    }

    /// The contender of that name.
    ///
    /// # Errors
    /// When there is none; names those there are.
    pub(crate) fn named(name: &str) -> Result<&'static Contender> {
        let everybody = || Contender::all().chain(Contender::techniques());
        match everybody().find(|contender| contender.name == name) {
            Some(contender) => Ok(contender),
            None => {
                let names: Vec<&str> = everybody().map(|contender| contender.name).collect();
                bail!("no contender {name}; there are {}", names.join(", "))
            }
        }
    }

    /// Whether it is godwit, whatever its options.
    pub(crate) fn is_godwit(&self) -> bool {
        matches!(self.means, Means::Godwit(_))
    }

    /// Whether the guest runs at the target before its memory is there: its pause can't be held against others'.
    pub(crate) fn is_postcopy(&self) -> bool {
        matches!(&self.means, Means::Qemu(way) if way.postcopy)
    }

    /// What it is, in a line for people.
    pub(crate) fn describe(&self) -> String {
        match &self.means {
            Means::Godwit([]) => "as it comes".to_owned(),
            Means::Godwit(options) => format!("`{}`", options.join(" ")),
            Means::Qemu(way) => way.describe(),
        }
    }

    /// Boots a guest at host a and moves it to host b.
    ///
    /// # Errors
    /// When something breaks; a guest that doesn't get there in time is an outcome.
    pub(crate) fn run(&self, stage: &Stage) -> Result<Outcome> {
        let moved = match &self.means {
            Means::Godwit(options) => godwit::run(stage, self.name, options),
            Means::Qemu(way) => plain_qemu::run(stage, self.name, way),
        };
        moved.with_context(|| format!("{} failed", self.name))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn contenders_are_found_by_names_that_differ() {
        let everybody = Contender::all().chain(Contender::techniques());
        let names: BTreeSet<&str> = everybody.map(|contender| contender.name).collect();
        assert_eq!(names.len(), ALL.len() + TECHNIQUES.len());
        assert!(Contender::named(GODWIT).unwrap().is_godwit());
        assert!(Contender::named("qemu-postcopy").unwrap().is_postcopy());
        assert!(Contender::named("xen").unwrap_err().to_string().contains("qemu-xbzrle"));
    }
}
