//! What a running machine's processor gives its guest, and whether another host's would do as well.
//!
//! A guest looks at its processor when it boots, its programs when they start, and both rely on what they found. QEMU
//! doesn't send what that was: a target whose processor gives less loads the guest's state without a word, and the
//! guest dies of the first instruction that isn't there. The name of the model doesn't tell either: `host` and `max`
//! mean what the host has, and of any model QEMU takes away what host and accelerator can't give, which it says in its
//! log only. So [`Processor::of`] asks a running QEMU (an incoming one too) what came of the model on its host, and
//! [`Processor::check_replacement`] compares, without I/O. That is hundreds of questions, of which two hosts whose
//! [`Outline`]s are equal need none.

use std::collections::BTreeSet;

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::{
    machine::shown,
    qmp::{Client, QmpError},
};

/// Questions to the monitor that are under way at the same time; there are some hundreds.
const ASKED_AT_ONCE_MAX: usize = 32;
/// Features that are named in one line; the rest is counted.
const LISTED_MAX: usize = 8;

/// What a guest has of its processor, as far as it relies on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Whether KVM executes it, or QEMU's translator.
    pub kvm: bool,
    /// The maker that it names itself: under KVM the host's, unless the model says another.
    pub vendor: String,
    /// Bits of a physical address.
    pub physical_address_bits: u32,
    /// QEMU's names of the features that it has.
    pub features: BTreeSet<String>,
}

/// What an emulated processor is, in a handful of questions. Of two that have the same outline neither lacks anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outline {
    /// The maker that it names itself.
    pub vendor: String,
    /// Bits of a physical address.
    pub physical_address_bits: u32,
    /// What its CPUID instruction says of its features; without words that are zero, which a later QEMU has more of.
    pub words: BTreeSet<FeatureWord>,
}

/// 32 features, as QEMU's `feature-words` has them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FeatureWord {
    /// Which leaf of CPUID they are in.
    #[serde(rename = "cpuid-input-eax")]
    pub leaf: u32,
    /// Which part of it, where it has several.
    #[serde(rename = "cpuid-input-ecx", default)]
    pub part: u32,
    /// Which register: `EAX` and so on.
    #[serde(rename = "cpuid-register")]
    pub register: String,
    /// The bits.
    pub features: u32,
}

/// Why a guest couldn't go on with another processor; one line, with what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProcessorMismatch {
    /// Neither loads what the other saved.
    #[error("{here} executes it here and {there} would there; start it with an `accel` that both hosts have")]
    Accelerator {
        /// `KVM` or `TCG`.
        here: &'static str,
        /// The other.
        there: &'static str,
    },
    /// Makers differ in instructions of which the guest's kernel has chosen one, such as those of system calls.
    #[error(
        "its processor is by {here} and would be by {there}; start it with a `cpu` that ends in `,vendor={here}`",
        here = shown(here), there = shown(there)
    )]
    Vendor {
        /// As the guest knows it.
        here: String,
        /// As it would be.
        there: String,
    },
    /// Instructions and registers that the guest may be using would be gone.
    #[error(
        "its processor would lack {}; start it with a `cpu` that both hosts have, such as the default",
        list_features(.0)
    )]
    Features(BTreeSet<String>),
    /// The guest may be using addresses that the other can't form.
    #[error(
        "its physical addresses have {here} bits and would have {there}; start it with a `cpu` that ends in \
         `,host-phys-bits=off,phys-bits={there}`"
    )]
    AddressBits {
        /// As the guest knows it.
        here: u32,
        /// As it would be.
        there: u32,
    },
}

impl Processor {
    /// What QEMU's first virtual CPU is; all are alike.
    ///
    /// # Errors
    /// If the monitor fails, or QEMU has none of these questions.
    pub async fn of(monitor: &Client) -> Result<Self, QmpError> {
        let path = &monitor.first_cpu_path().await?;
        let (kvm, vmx) = (monitor.query_kvm().await?, monitor.qom_get::<bool>(path, "vmx").await?);
        let mut names = monitor.cpu_feature_names().await?;
        names.retain(|name| is_asked(name, kvm, vmx));
        let asked: Vec<_> = names.iter().map(|name| monitor.qom_get::<bool>(path, name)).collect();
        let answers: Vec<bool> = stream::iter(asked).buffered(ASKED_AT_ONCE_MAX).try_collect().await?;
        let given = names.iter().zip(answers).filter(|(_, given)| *given);
        Ok(Self {
            kvm,
            vendor: monitor.qom_get(path, "vendor").await?,
            physical_address_bits: monitor.qom_get(path, "phys-bits").await?,
            features: given.map(|(name, _)| name.clone()).collect(),
        })
    }

    /// Whether a guest that has had this processor can go on with `there`, which may have more.
    ///
    /// # Errors
    /// The first thing that the guest would miss.
    ///
    /// ```
    /// use godwit_qemu::processor::Processor;
    /// let processor = |features: &[&str]| Processor {
    ///     kvm: true,
    ///     vendor: "GenuineIntel".to_owned(),
    ///     physical_address_bits: 40,
    ///     features: features.iter().map(|name| (*name).to_owned()).collect(),
    /// };
    /// let (old, new) = (processor(&["aes"]), processor(&["aes", "avx2"]));
    /// assert_eq!(old.check_replacement(&new), Ok(()));
    /// assert!(new.check_replacement(&old).unwrap_err().to_string().contains("would lack avx2;"));
    /// ```
    pub fn check_replacement(&self, there: &Self) -> Result<(), ProcessorMismatch> {
        if self.kvm != there.kvm {
            let (here, there) = (self.accelerator(), there.accelerator());
            return Err(ProcessorMismatch::Accelerator { here, there });
        }
        if self.vendor != there.vendor {
            let (here, there) = (self.vendor.clone(), there.vendor.clone());
            return Err(ProcessorMismatch::Vendor { here, there });
        }
        let lacking = self.beyond(there);
        if !lacking.is_empty() {
            return Err(ProcessorMismatch::Features(lacking));
        }
        let (here, there) = (self.physical_address_bits, there.physical_address_bits);
        if here > there {
            return Err(ProcessorMismatch::AddressBits { here, there });
        }
        Ok(())
    }

    /// The features that `other` hasn't.
    pub fn beyond(&self, other: &Self) -> BTreeSet<String> {
        self.features.difference(&other.features).cloned().collect()
    }

    fn accelerator(&self) -> &'static str {
        if self.kvm { "KVM" } else { "TCG" }
    }
}

impl Outline {
    /// What QEMU's first virtual CPU is; `None` under KVM, where a guest may also rely on what no word of CPUID tells:
    /// model-specific registers, and what Hyper-V has.
    ///
    /// # Errors
    /// If the monitor fails, or QEMU has none of these questions.
    pub async fn of(monitor: &Client) -> Result<Option<Self>, QmpError> {
        if monitor.query_kvm().await? {
            return Ok(None);
        }
        let path = &monitor.first_cpu_path().await?;
        let words: Vec<FeatureWord> = monitor.qom_get(path, "feature-words").await?;
        Ok(Some(Self {
            vendor: monitor.qom_get(path, "vendor").await?,
            physical_address_bits: monitor.qom_get(path, "phys-bits").await?,
            words: words.into_iter().filter(|word| word.features != 0).collect(),
        }))
    }
}

/// Whether a feature says something: of what isn't there, its details don't. QEMU reads its monitor byte by byte, so that a
/// question takes half a millisecond of a host that is about to be busy.
fn is_asked(name: &str, kvm: bool, vmx: bool) -> bool {
    (vmx || !name.starts_with("vmx-")) && (kvm || !name.starts_with("kvm-"))
}

/// Features for one line of text; those of another host may be any strings.
pub fn list_features(features: &BTreeSet<String>) -> String {
    let named: Vec<String> = features.iter().take(LISTED_MAX).map(|name| shown(name)).collect();
    match features.len() - named.len() {
        0 => named.join(", "),
        more => format!("{} and {more} more features", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    fn processor(features: BTreeSet<String>) -> Processor {
        Processor { kvm: true, vendor: "GenuineIntel".into(), physical_address_bits: 40, features }
    }

    fn any_features() -> impl Strategy<Value = BTreeSet<String>> {
        btree_set("[a-e]", 0..5)
    }

    proptest! {
        #[test]
        fn whatever_the_guest_has_must_be_there_and_more_may_be(here in any_features(), there in any_features()) {
            let outcome = processor(here.clone()).check_replacement(&processor(there.clone()));
            prop_assert_eq!(outcome.is_ok(), here.is_subset(&there));
            if let Err(ProcessorMismatch::Features(lacking)) = outcome {
                prop_assert!(lacking.is_subset(&here) && lacking.is_disjoint(&there));
                prop_assert!(here.iter().all(|name| there.contains(name) || lacking.contains(name)));
            }
        }
    }

    #[test]
    fn what_is_wrong_is_one_line_with_a_remedy() {
        let here = processor(BTreeSet::new());
        let refused = |there: Processor, said: &str| {
            let line = here.check_replacement(&there).unwrap_err().to_string();
            assert!(
                line.contains(said) && line.contains("; start it with") && line.lines().count() == 1,
                "{line}"
            );
        };
        refused(Processor { kvm: false, ..here.clone() }, "KVM executes it here and TCG would there");
        refused(Processor { vendor: "Authentic\nAMD".into(), ..here.clone() }, r"by Authentic\nAMD");
        refused(Processor { physical_address_bits: 39, ..here.clone() }, "have 40 bits and would have 39");
        here.check_replacement(&Processor { physical_address_bits: 46, ..here.clone() }).unwrap();
    }

    #[test]
    fn details_of_what_is_not_there_are_not_asked_for() {
        let asked = |kvm, vmx| ["vmx", "vmx-ept", "kvm-pv-eoi", "avx"].map(|name| is_asked(name, kvm, vmx));
        assert_eq!(asked(true, true), [true; 4]);
        assert_eq!(asked(true, false), [true, false, true, true]);
        assert_eq!(asked(false, false), [true, false, false, true]);
    }

    #[test]
    fn a_long_list_is_cut() {
        let features: BTreeSet<String> = (10..30).map(|number| format!("f{number}")).collect();
        assert_eq!(list_features(&features), "f10, f11, f12, f13, f14, f15, f16, f17 and 12 more features");
        assert_eq!(list_features(&["a\u{1b}".to_owned()].into()), r"a\u{1b}");
    }
}
