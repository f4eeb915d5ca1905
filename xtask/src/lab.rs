//! A lab to try things in by hand.

use std::{fmt, io::BufRead, time::Duration};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    lab::{GUEST_BRIDGE, Lab, Place},
    link::Shape,
};

const COMMANDS: &str = "cut | restore | link RATE_MBIT ROUND_TRIP_MS [LOSS_PERCENT] | show | quit";

/// A link between two hosts, as command lines have it.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Link {
    /// Rate of the link, Mbit/s.
    #[arg(long, default_value_t = 100)]
    pub(crate) rate: u64,
    /// Round trip of the link, milliseconds.
    #[arg(long, default_value_t = 20)]
    pub(crate) round_trip: u64,
}

impl Link {
    pub(crate) fn round_trip(&self) -> Duration {
        Duration::from_millis(self.round_trip)
    }

    pub(crate) fn shape(&self) -> Shape {
        Shape::symmetric(self.rate, self.round_trip())
    }
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} Mbit/s with a round trip of {} ms", self.rate, self.round_trip)
    }
}

/// Makes a lab, says how to enter it, and obeys commands until `quit` or the end of its input.
///
/// # Errors
/// Without root, or when the link fails. A mistyped command is only told.
pub(crate) fn run(link: &Link) -> Result<()> {
    let lab = Lab::new(link.shape())?;
    for place in [Place::A, Place::B, Place::Lan] {
        println!(
            "{:<4} {:<11} nsenter --net={}",
            place.name(),
            place.address(),
            lab.namespace(place).path().display()
        );
    }
    println!(
        "guests' TAPs go on {GUEST_BRIDGE} of a and b; clients are at {}\n{COMMANDS}",
        Place::Lan.address()
    );
    for line in std::io::stdin().lock().lines() {
        let words: Vec<String> = line?.split_whitespace().map(str::to_owned).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if words == ["quit"] {
            break;
        }
        if let Err(error) = obey(&lab, &words) {
            eprintln!("{error:#}");
        }
    }
    Ok(())
}

fn obey(lab: &Lab, words: &[&str]) -> Result<()> {
    match words {
        [] => {}
        ["cut"] => lab.cut(),
        ["restore"] => lab.restore(),
        ["link", shape @ ..] => lab.reshape(&parse_shape(shape)?),
        ["show"] => {
            let statistics = lab.relay_statistics();
            println!(
                "a to b  {:?}\nb to a  {:?}\ncpu     {:?}",
                statistics.forward, statistics.backward, statistics.cpu
            );
        }
        _ => bail!("{COMMANDS}"),
    }
    Ok(())
}

/// Reads `RATE_MBIT ROUND_TRIP_MS [LOSS_PERCENT]`.
fn parse_shape(words: &[&str]) -> Result<Shape> {
    let (rate, round_trip, loss) = match words {
        [rate, round_trip] => (rate, round_trip, "0"),
        [rate, round_trip, loss] => (rate, round_trip, *loss),
        _ => bail!("{COMMANDS}"),
    };
    let loss: f64 = loss.parse().context("the loss is a percentage")?;
    if !(0.0..=100.0).contains(&loss) {
        bail!("the loss is a percentage");
    }
    let rate = rate.parse::<u32>().context("the rate is a whole number of Mbit/s")?;
    let round_trip = round_trip.parse::<u32>().context("the round trip is a whole number of milliseconds")?;
    let shape = Shape::symmetric(rate.into(), Duration::from_millis(round_trip.into()));
    Ok(Shape { loss: loss / 100.0, ..shape })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_from_words() {
        let shape = parse_shape(&["100", "20", "0.5"]).unwrap();
        assert_eq!(shape, Shape { loss: 0.005, ..Shape::symmetric(100, Duration::from_millis(20)) });
        for wrong in
            [&["100"][..], &["-1", "20"], &["1", "2", "101"], &["1", "2", "NaN"], &["1", "2", "3", "4"]]
        {
            assert!(parse_shape(wrong).is_err(), "{wrong:?}");
        }
    }
}
