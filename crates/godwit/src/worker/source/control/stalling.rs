//! What is said and done when the downtime target can't be met.

use godwit_migration::{
    handover::Action,
    stall::{OnStall, Prices, Ruling},
    throttle::CpuShare,
};

use super::Control;
use crate::{
    job,
    output::one_line,
    quantity::{rate, time_ms},
};

impl Control<'_> {
    /// Follows the ruling. What was decided stays decided, as long as the link carries.
    pub(super) fn follow(&mut self, ruling: Ruling) -> Vec<Action> {
        match ruling {
            _ if self.stop.is_wanted => {}
            Ruling::Stop(_) => self.stop.is_wanted = true,
            Ruling::Run(share) => self.slow(share),
            Ruling::GiveUp => {
                self.cancelled = true;
                let target = self.job.options.downtime_target_ms;
                return self.abort(format!(
                    "the downtime target of {target} ms can't be met; given up, as was chosen"
                ));
            }
        }
        vec![]
    }

    /// A guest that can't be slowed is stopped when it offers its shortest pause.
    fn slow(&mut self, share: CpuShare) {
        if let Err(error) = self.brake.set(share) {
            self.journal
                .warn(format!("the guest can't be slowed: {}; it is switched instead", one_line(&error)));
            self.pilot.choose(OnStall::Switch);
        }
    }

    /// The operator chooses anew.
    pub(super) fn choose(&mut self, choice: job::OnStall) {
        self.pilot.choose(choice.into());
        self.brake.release();
    }

    /// Says what each choice would cost.
    pub(super) fn tell_prices(&self, prices: &Prices) {
        self.journal.warn(in_words(prices, &self.job.spec.name, self.pilot.on_stall()));
    }
}

fn in_words(prices: &Prices, machine: &str, chosen: OnStall) -> String {
    let waiting = if prices.waiting_may_end() { "may have no end" } else { "has no end" };
    let throttling = prices.throttle.map_or_else(
        || "not even throttling it as far as may be would help".to_owned(),
        |price| {
            let (percent, time) = (price.share.percent(), time_ms(price.time_ms));
            format!("throttling it to {percent} % of its speed would meet the target in about {time}")
        },
    );
    let chosen = match chosen {
        OnStall::Wait => "wait",
        OnStall::Throttle => "throttle",
        OnStall::Switch => "switch",
        OnStall::Cancel => "cancel",
    };
    format!(
        "the downtime target of {} can't be met: the guest writes {} of changes, the link carries {}. Waiting {waiting}; \
         switching now would pause the guest for {}; {throttling}. Chosen is {chosen}; \
         `godwit set-on-stall {machine} wait|throttle|switch|cancel` changes that",
        time_ms(prices.target_ms),
        rate(prices.dirty_bytes_per_second),
        rate(prices.rate_bytes_per_second),
        time_ms(prices.switch_pause_ms),
    )
}

#[cfg(test)]
mod tests {
    use godwit_migration::stop::Sample;

    use super::*;

    #[test]
    fn every_choice_has_its_price() {
        let sample = Sample {
            dirty_bytes_per_second: 100_000_000,
            rate_bytes_per_second: 12_500_000,
            predicted_pause_ms: 2_050.0,
            ..Sample::default()
        };
        let words = in_words(&Prices::of(&sample, 50.0), "web1", OnStall::Switch);
        let expected = "the downtime target of 50 ms can't be met: the guest writes 800 Mbit/s of changes, the link carries \
                        100 Mbit/s. Waiting has no end; switching now would pause the guest for 2.05 s; throttling it to 6 % \
                        of its speed would meet the target in about 4.85 s. Chosen is switch; \
                        `godwit set-on-stall web1 wait|throttle|switch|cancel` changes that";
        assert_eq!(words, expected);
    }
}
