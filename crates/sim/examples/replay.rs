//! Replays migrations of the simulator: `replay SEED` prints the trace of one, `replay FROM TO` runs many and stops at
//! the first that fails.

use std::process::ExitCode;

use godwit_sim::simulator::{Account, run, trace};

fn main() -> ExitCode {
    let seeds: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    match seeds[..] {
        [seed] => {
            trace(seed, None).iter().for_each(|line| println!("{line}"));
            end(run(seed, None).map_err(|failure| format!("seed {seed}: {}", failure.violation)))
        }
        [from, to] => end(many(from, to)),
        _ => end(Err("usage: replay SEED, or replay FROM TO".into())),
    }
}

fn many(from: u64, to: u64) -> Result<Account, String> {
    let mut all = Account::default();
    for seed in from..to {
        all += run(seed, None).map_err(|failure| failure.to_string())?;
    }
    Ok(all)
}

fn end(result: Result<Account, String>) -> ExitCode {
    match result {
        Ok(account) => {
            println!("{account:?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
