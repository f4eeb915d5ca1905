//! Everybody who can move a guest.

use anyhow::{Context, Result, bail};

use super::{
    GODWIT, Load, Outcome, Patience, Stage, fleet, godwit,
    plain_qemu::{self, Way},
};

/// One way to move a guest, under the name that tables give it.
#[derive(Debug)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    means: Means,
}

/// QEMU as it comes.
const PLAIN: &str = "qemu-precopy";
/// The same, but the guest is slowed if it has to be.
const SLOWING: &str = "qemu-auto-converge";
/// godwit without its cache across guests.
pub(crate) const NO_SHARED: &str = "godwit-no-shared";

#[derive(Debug)]
enum Means {
    /// godwit, with these options for `migrate`.
    Godwit(&'static [&'static str]),
    /// QEMU alone.
    Qemu(Way),
}

const ALL: [Contender; 11] = [
    Contender { name: GODWIT, means: Means::Godwit(&[]) },
    Contender { name: "godwit-smart-stop", means: Means::Godwit(&["--stop-policy", "smart-stop"]) },
    Contender { name: PLAIN, means: Means::Qemu(plain_qemu::PRECOPY) },
    Contender { name: SLOWING, means: Means::Qemu(plain_qemu::AUTO_CONVERGE) },
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

/// Those that only some benches have: godwit without what several guests have use of, that each profits from the pages
/// that others have sent; godwit where it can't read the guest's memory, and over two connections; and QEMU with what costs
/// nothing but processor time, which only the fastest links show.
const SPECIAL: [Contender; 5] = [
    Contender { name: NO_SHARED, means: Means::Godwit(&["--without", "shared"]) },
    Contender { name: "godwit-inline", means: Means::Godwit(&["--inline"]) },
    Contender { name: "godwit-connections", means: Means::Godwit(&["--connections", "2"]) },
    Contender { name: "qemu-precopy-tls", means: Means::Qemu(plain_qemu::PRECOPY_TLS) },
    Contender { name: "qemu-multifd-tls", means: Means::Qemu(plain_qemu::MULTIFD_TLS) },
];

impl Contender {
    /// Everybody but the techniques and those for special benches, in the order in which tables list them.
    pub(crate) fn all() -> impl Iterator<Item = &'static Contender> {
        const { &ALL }.iter()
    }

    /// godwit's techniques, each alone and each left out.
    pub(crate) fn techniques() -> impl Iterator<Item = &'static Contender> {
        const { &TECHNIQUES }.iter()
    }

    /// Everybody.
    fn all_there_are() -> impl Iterator<Item = &'static Contender> {
        Contender::all().chain(Contender::techniques()).chain(const { &SPECIAL })
    }

    /// The contender of that name.
    ///
    /// # Errors
    /// When there is none; names those there are.
    pub(crate) fn named(name: &str) -> Result<&'static Contender> {
        match Contender::all_there_are().find(|contender| contender.name == name) {
            Some(contender) => Ok(contender),
            None => {
                let names: Vec<&str> = Contender::all_there_are().map(|contender| contender.name).collect();
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

    /// Whether it is a QEMU that encrypts by itself.
    pub(crate) fn is_qemu_with_tls(&self) -> bool {
        matches!(&self.means, Means::Qemu(way) if way.tls)
    }

    /// Whose failure it is for: it isn't needed where that one gets the guest to the target.
    pub(crate) fn stands_in_for(&self) -> Option<&'static str> {
        (self.name == SLOWING).then_some(PLAIN)
    }

    /// What it is, in a line for people; `patience` is what it had.
    pub(crate) fn describe(&self, patience: Patience) -> String {
        match &self.means {
            Means::Godwit([]) => "as it comes".to_owned(),
            Means::Godwit(options) => format!("`{}`", options.join(" ")),
            Means::Qemu(way) => way.describe(patience),
        }
    }

    /// Boots the stage's guests at host a and moves them to host b.
    ///
    /// # Errors
    /// When something breaks; a guest that doesn't get there in time is an outcome.
    pub(crate) fn run(&self, stage: &Stage) -> Result<Outcome> {
        let moved = match &self.means {
            Means::Godwit(options) if matches!(stage.load, Load::Build { .. }) => {
                fleet::run(stage, self.name, options)
            }
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
        let names: BTreeSet<&str> = Contender::all_there_are().map(|contender| contender.name).collect();
        assert_eq!(names.len(), ALL.len() + TECHNIQUES.len() + SPECIAL.len());
        assert!(Contender::named("qemu-multifd-tls").unwrap().is_qemu_with_tls());
        assert!(Contender::named(GODWIT).unwrap().is_godwit());
        assert!(Contender::named("qemu-postcopy").unwrap().is_postcopy());
        assert!(Contender::named("xen").unwrap_err().to_string().contains("qemu-xbzrle"));
    }
}
