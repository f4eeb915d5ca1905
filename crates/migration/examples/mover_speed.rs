//! How long the mover takes over a 512 MB guest: `cargo run --release -p godwit-migration --example mover_speed`.

use std::{hint::black_box, time::Instant};

use godwit_migration::{
    BlockId,
    mover::{Mover, Settings},
};

const BLOCKS: u64 = 131_072;
const ROUNDS: u32 = 50;

fn main() {
    let mut mover = Mover::new(BLOCKS, Settings::default());
    measure("owe every block", || {
        let _ = black_box(mover.owe_many((0..BLOCKS).map(BlockId)));
    });
    measure("a pass, everything owed", || mover.next_pass());
    let mut batch = Vec::with_capacity(64);
    measure("owe and take every block, 64 at a time", || {
        let _ = mover.owe_many((0..BLOCKS).map(BlockId));
        mover.next_pass();
        while mover.take(64, &mut batch).blocks() > 0 {
            black_box(&batch);
            batch.clear();
        }
    });
    measure("take with nothing owed", || {
        black_box(mover.take(64, &mut batch));
    });
    println!("{:.2} bytes a block", mover.memory_bytes() as f64 / BLOCKS as f64);
}

fn measure(what: &str, mut act: impl FnMut()) {
    let began = Instant::now();
    (0..ROUNDS).for_each(|_| act());
    println!("{what}: {:.1} µs", began.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS));
}
