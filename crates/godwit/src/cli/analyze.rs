//! `godwit analyze`.

use std::path::Path;

use super::exit::Failure;
use crate::output::Output;

/// Analyses a file.
pub(super) fn run(file: &Path, _output: Output) -> Result<(), Failure> {
    Err(Failure::refused(format!("{} can't be analysed yet", file.display())))
}
