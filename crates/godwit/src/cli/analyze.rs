//! `godwit analyze`: what each technique would save on a memory image or a captured migration stream.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use godwit_content::{
    BLOCK_BYTES, BlockId, Techniques,
    analyze::{Analysis, AnalysisLimits, Analyzer},
};
use godwit_qemu::stream::{PageContent, PageRoute, RamBlock, RamPage, RamSectionEnd, Splitter, StreamSink};

use super::exit::Failure;
use crate::{
    output::{Output, bar, table},
    quantity::{count, size},
};

/// How a migration stream begins.
const STREAM_MAGIC: &[u8; 4] = b"QEVM";
/// A file is read in pieces of so many pages.
const PIECE_PAGES: usize = 256;
/// The width of a bar.
const BAR_CELLS: usize = 30;

/// Analyses a file: a stream if it begins like one, else a raw image.
pub(super) fn run(path: &Path, output: Output) -> Result<(), Failure> {
    let named = |error: io::Error| Failure::invalid(format!("can't read {}: {error}", path.display()));
    let mut file = File::open(path).map_err(named)?;
    let mut magic = Vec::new();
    (&mut file).take(STREAM_MAGIC.len() as u64).read_to_end(&mut magic).map_err(named)?;
    let is_stream = magic == STREAM_MAGIC;
    let whole = io::Cursor::new(magic).chain(file);
    let analyzer = if is_stream { read_stream(whole, path)? } else { read_image(whole, path)? };
    output.answer(&analyzer.finish(), show);
    Ok(())
}

fn read_image(mut image: impl Read, path: &Path) -> Result<Analyzer, Failure> {
    let mut analyzer = Analyzer::new(AnalysisLimits::default());
    let mut piece = vec![0; PIECE_PAGES * BLOCK_BYTES];
    let mut next_page = 0;
    loop {
        let length = fill(&mut image, &mut piece)?;
        let (pages, rest) = piece[..length].as_chunks::<BLOCK_BYTES>();
        for page in pages {
            analyzer.push(BlockId(next_page), page);
            next_page += 1;
        }
        if !rest.is_empty() {
            let path = path.display();
            return Err(Failure::invalid(format!(
                "{path} isn't a memory image: its size isn't a whole number of pages of {BLOCK_BYTES} bytes"
            )));
        }
        if length < piece.len() {
            return Ok(analyzer);
        }
    }
}

fn read_stream(mut stream: impl Read, path: &Path) -> Result<Analyzer, Failure> {
    let mut pages = Pages { analyzer: Analyzer::new(AnalysisLimits::default()), first_pages: Vec::new() };
    let mut splitter = Splitter::new();
    let mut piece = vec![0; PIECE_PAGES * BLOCK_BYTES];
    let damaged = |error| Failure::invalid(format!("{}: {error}", path.display()));
    loop {
        let length = fill(&mut stream, &mut piece)?;
        splitter.push(&piece[..length], &mut pages).map_err(damaged)?;
        if length < piece.len() {
            splitter.finish().map_err(damaged)?;
            return Ok(pages.analyzer);
        }
    }
}

/// Reads until the buffer is full or the input ends.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Gives a stream's pages to the analyzer; pages are counted through all RAM blocks, in the stream's order.
struct Pages {
    analyzer: Analyzer,
    first_pages: Vec<u64>,
}

impl StreamSink for Pages {
    fn pass(&mut self, _bytes: &[u8]) {}

    fn ram_blocks(&mut self, blocks: &[RamBlock]) {
        let mut next = 0_u64;
        for block in blocks {
            self.first_pages.push(next);
            next = next.saturating_add(block.used_bytes / BLOCK_BYTES as u64);
        }
    }

    fn page(&mut self, page: &RamPage<'_>) -> PageRoute {
        let first = self.first_pages.get(page.block).copied().unwrap_or_default();
        let id = BlockId(first.saturating_add(page.offset / BLOCK_BYTES as u64));
        match page.content {
            PageContent::Bytes(bytes) => self.analyzer.push(id, bytes),
            PageContent::Zero(fill) => self.analyzer.push(id, &[fill; BLOCK_BYTES]),
        }
        PageRoute::Take
    }

    fn ram_section_end(&mut self, _end: RamSectionEnd) {}
}

fn show(analysis: &Analysis) -> String {
    let total = size(analysis.pages.saturating_mul(BLOCK_BYTES as u64));
    let mut text = format!("{} pages, {total}\n\n", count(analysis.pages));
    text.push_str(&savings(analysis));
    text.push_str(&redundancy(analysis));
    if !analysis.delta_sizes.is_empty() {
        text.push_str(&resent(analysis));
    }
    text
}

/// CloudNet, Figure 6.9.
fn savings(analysis: &Analysis) -> String {
    let rows: Vec<_> = analysis
        .savings
        .iter()
        .map(|saving| {
            [
                technique(saving.techniques).to_owned(),
                size(saving.tally.encoded_bytes),
                format!("{:.1} %", saving.saved_percent),
                bar(saving.saved_percent / 100.0, BAR_CELLS),
            ]
        })
        .collect();
    table(["TECHNIQUE", "ON THE WIRE", "SAVED", ""], &rows)
}

fn technique(techniques: Techniques) -> &'static str {
    match techniques {
        Techniques::ALL => "all together",
        Techniques { zero: true, .. } => "zero pages",
        Techniques { reference: true, .. } => "pages seen before",
        Techniques { shared: true, .. } => "pages of another guest",
        Techniques { sub_block: true, .. } => "1 KiB blocks seen before",
        Techniques { delta: true, .. } => "deltas",
        Techniques { compress: true, .. } => "zstd",
        _ => "nothing",
    }
}

/// CloudNet, Figures 6.4 (c) and 6.11.
fn redundancy(analysis: &Analysis) -> String {
    let mut sampled = false;
    let rows: Vec<_> = analysis
        .redundancy
        .iter()
        .map(|at| {
            let estimate = at.sampled_percent < 100.0;
            sampled |= estimate;
            [
                format!(
                    "{} ({})",
                    at.blocks_per_page,
                    size(BLOCK_BYTES as u64 / u64::from(at.blocks_per_page))
                ),
                format!("{:.1} %", at.zero_percent),
                format!("{}{:.1} %", if estimate { "≈ " } else { "" }, at.repeated_percent),
                bar((at.zero_percent + at.repeated_percent) / 100.0, BAR_CELLS),
            ]
        })
        .collect();
    let note = if sampled { "≈: estimated from a sample of the contents\n" } else { "" };
    format!("\n{}{note}", table(["BLOCKS A PAGE", "ZERO", "REPEATED", ""], &rows))
}

/// CloudNet, Figure 6.5 and Table 6.2.
fn resent(analysis: &Analysis) -> String {
    let pages: u64 = analysis.delta_sizes.iter().map(|bar| bar.pages).sum();
    let rows: Vec<_> = analysis
        .delta_sizes
        .iter()
        .map(|sizes| {
            let share = sizes.pages as f64 / pages.max(1) as f64;
            [format!("≤ {}", size(sizes.up_to_bytes)), count(sizes.pages), bar(share, BAR_CELLS)]
        })
        .collect();
    let passes = &analysis.passes;
    let rows_of_passes = [
        ["sent first".to_owned(), size(passes.first_bytes)],
        ["sent again".to_owned(), size(passes.later_bytes)],
        ["  saved by deltas".to_owned(), size(passes.delta_saved_bytes)],
        ["  without a base".to_owned(), size(passes.without_base_bytes)],
    ];
    format!("\n{}\n{}", table(["DELTA", "PAGES", ""], &rows), table(["PAGES", "BYTES"], &rows_of_passes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn analysis(pages: &[[u8; BLOCK_BYTES]]) -> Analysis {
        let bytes = pages.concat();
        read_image(&bytes[..], Path::new("memory.img")).unwrap_or_else(|error| panic!("{error}")).finish()
    }

    #[test]
    fn an_image_of_zeros_costs_nothing_and_is_shown() {
        let analysis = analysis(&[[0; BLOCK_BYTES]; 300]);
        assert_eq!(analysis.pages, 300);
        let text = show(&analysis);
        assert!(text.contains("all together"), "{text}");
        assert!(text.contains("BLOCKS A PAGE"), "{text}");
        assert!(!text.contains("DELTA"), "a plain image has no second versions: {text}");
    }

    #[test]
    fn what_is_no_image_and_no_stream_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("file");
        for bytes in [&b"QEVM"[..], b"QEVM\0\0\0\x03\xff", &[7; BLOCK_BYTES + 1]] {
            fs::write(&path, bytes).unwrap();
            let error = run(&path, Output { json: true }).unwrap_err();
            assert_eq!(error.to_string().lines().count(), 1);
        }
    }

    #[test]
    fn every_trial_has_a_name() {
        for saving in analysis(&[[1; BLOCK_BYTES]]).savings {
            assert_ne!(technique(saving.techniques), "nothing", "{:?}", saving.techniques);
        }
    }
}
