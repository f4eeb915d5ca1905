//! The process that carries one migration, at either end.

use std::path::PathBuf;

/// Carries the migration whose job lies in `directory`, to its end.
pub fn run(directory: PathBuf) -> anyhow::Result<()> {
    anyhow::bail!("the worker for {} isn't written yet", directory.display())
}
