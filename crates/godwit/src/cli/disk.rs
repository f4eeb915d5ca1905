//! `godwit disk`: what this host has of its machines' disks.

use std::path::Path;

use godwit_block::{Checked, Disk, DiskError, WholeError, repository::Repository};
use serde_json::json;

use super::{arguments::DiskVerb, client::Client, exit::Failure, image::bar};
use crate::{
    api::{DiskView, Places, Problem, ProblemCode, Removed},
    output::{Output, one_line, table},
    quantity::size,
};

/// Cells of the picture in a line.
const LINE_CELLS: usize = 64;

/// Does what is asked with disks.
pub(super) async fn run(client: &Client, verb: DiskVerb, output: Output) -> Result<(), Failure> {
    match verb {
        DiskVerb::Ls => {
            let disks: Vec<DiskView> = client.get("/v1/disks").await?;
            output.answer(&disks, |disks| list(disks));
        }
        DiskVerb::Show { name } => {
            let disk: DiskView = client.get(&path(&name)).await?;
            output.answer(&disk, show);
        }
        DiskVerb::Check { name, repair } => check(&client.get(&path(&name)).await?, repair, output).await?,
        DiskVerb::Export { name, to } => export(&client.get(&path(&name)).await?, &to, output).await?,
        DiskVerb::Rm { name } => {
            let removed: Removed = client.delete(&path(&name)).await?;
            output.answer(&removed, |removed| format!("{} is gone", removed.name));
        }
    }
    Ok(())
}

async fn check(view: &DiskView, repair: bool, output: Output) -> Result<(), Failure> {
    let mut disk = open(view).await?;
    let bar = bar(format!("checking {}", view.name), output);
    let checked = disk.check(repair, |done, total| {
        bar.set_length(total.into());
        bar.set_position(done.into());
    });
    let checked = checked.await;
    bar.finish_and_clear();
    let closed = disk.close();
    let checked = checked?;
    closed?;
    let Checked { good_chunks, bad_chunks, repaired_chunks, problems } = &checked;
    let told = json!({
        "name": view.name,
        "good_chunks": good_chunks,
        "bad_chunks": bad_chunks,
        "repaired_chunks": repaired_chunks,
        "problems": problems,
    });
    output.answer(&told, |_| {
        format!(
            "{}: {good_chunks} copied chunks right, {bad_chunks} not, {repaired_chunks} repaired",
            view.name
        )
    });
    if bad_chunks == repaired_chunks {
        return Ok(());
    }
    let first = problems.first().map_or("", String::as_str);
    Err(Failure::failed(format!(
        "{bad_chunks} chunks are not what the image has, the first: {first}; --repair fetches them anew"
    )))
}

async fn export(view: &DiskView, to: &Path, output: Output) -> Result<(), Failure> {
    let mut disk = open(view).await?;
    let bar = bar(format!("exporting {}", view.name), output);
    let exported = disk.export(to, |done, total| {
        bar.set_length(total.into());
        bar.set_position(done.into());
    });
    let exported = exported.await;
    bar.finish_and_clear();
    // A file that was there before isn't ours to remove.
    if exported.as_ref().is_err_and(|error| !matches!(error, WholeError::Exists(_))) {
        let _ = std::fs::remove_file(to);
    }
    let closed = disk.close();
    exported?;
    closed?;
    let told = json!({ "name": view.name, "file": to, "size_bytes": view.size_bytes });
    output.answer(&told, |_| format!("{} is in {}: {}", view.name, to.display(), size(view.size_bytes)));
    Ok(())
}

/// Opens a disk that nobody serves.
async fn open(view: &DiskView) -> Result<Disk, Failure> {
    let repository = view.image.as_ref().map(|_| Repository::open(&view.repository, std::env::vars()));
    Ok(Disk::open(&view.directory, repository.transpose()?).await?)
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        let code = match &error {
            DiskError::Locked { .. } => ProblemCode::Refused,
            _ => ProblemCode::Failed,
        };
        Self::Problem(Problem { code, message: one_line(&error) })
    }
}

impl From<WholeError> for Failure {
    fn from(error: WholeError) -> Self {
        match &error {
            WholeError::Exists(_) => Self::invalid(one_line(&error)),
            _ => Self::failed(one_line(&error)),
        }
    }
}

/// The path of a disk in the API; whatever can't be in a name can't be in the path either.
fn path(name: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || "-.".contains(*c);
    format!("/v1/disks/{}", name.chars().filter(plain).collect::<String>())
}

fn list(disks: &[DiskView]) -> String {
    if disks.is_empty() {
        return "no disks; a machine's file says `[[disk]]` and `size`, `image` or `adopt`".to_owned();
    }
    let rows: Vec<_> = disks
        .iter()
        .map(|disk| {
            [
                disk.name.clone(),
                size(disk.size_bytes),
                size(disk.total.written_bytes),
                size(disk.total.fetched_bytes),
                image(disk),
                disk.server_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            ]
        })
        .collect();
    table(["NAME", "SIZE", "WRITTEN", "COPIED", "BEGAN AS", "SERVER"], &rows)
}

/// What it began as.
fn image(disk: &DiskView) -> String {
    if let Some(problem) = &disk.problem {
        return format!("can't be read: {problem}");
    }
    if let Some(file) = &disk.beneath {
        return file.display().to_string();
    }
    disk.image.as_deref().map_or_else(|| "-".to_owned(), |id| id.chars().take(12).collect())
}

fn show(disk: &DiskView) -> String {
    let Places { base_bytes, fetched_bytes, written_bytes, zero_bytes } = disk.total;
    let (beneath, rest) = match (&disk.image, &disk.beneath) {
        (_, Some(_)) => ("adopted", "in that file"),
        (Some(_), _) => ("image", "missing"),
        (None, None) => ("image", "never written"),
    };
    let rows = [
        ["size".to_owned(), size(disk.size_bytes)],
        [beneath.to_owned(), image(disk)],
        ["█ written".to_owned(), size(written_bytes)],
        ["▒ copied".to_owned(), size(fetched_bytes)],
        ["0 zero".to_owned(), size(zero_bytes)],
        [format!("· {rest}"), size(base_bytes)],
    ];
    let cells: Vec<char> = disk.parts.iter().map(cell).collect();
    let lines: Vec<String> = cells.chunks(LINE_CELLS).map(|line| line.iter().collect()).collect();
    let each = disk
        .parts
        .first()
        .map_or(0, |part| part.base_bytes + part.fetched_bytes + part.written_bytes + part.zero_bytes);
    format!("{}\n{}\neach of {}", table(["disk", &disk.name], &rows), lines.join("\n"), size(each))
}

/// What a part has most of; what was written counts wherever there is any.
fn cell(part: &Places) -> char {
    let most = [('▒', part.fetched_bytes), ('0', part.zero_bytes), ('·', part.base_bytes)];
    if part.written_bytes > 0 {
        return '█';
    }
    most.into_iter().max_by_key(|(_, bytes)| *bytes).map_or('·', |(glyph, _)| glyph)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_drawn() {
        let part = |written_bytes, fetched_bytes, zero_bytes, base_bytes| Places {
            base_bytes,
            fetched_bytes,
            written_bytes,
            zero_bytes,
        };
        let broken = DiskView::unreadable("web2.0".into(), "no disk".into());
        let disk = DiskView {
            name: "web1.0".into(),
            problem: None,
            size_bytes: 4 << 20,
            image: Some("ab".repeat(32)),
            beneath: None,
            server_pid: None,
            directory: "/var/lib/godwit/disks/web1.0".into(),
            repository: "/var/lib/godwit/repository".into(),
            total: part(1, 2, 3, 4),
            parts: vec![part(1, 99, 0, 0), part(0, 9, 1, 0), part(0, 0, 5, 1), part(0, 1, 1, 9)],
        };
        let drawn = show(&disk);
        assert!(drawn.contains("\n█▒0·\n"), "{drawn}");
        let listed = list(&[disk, broken]);
        assert!(listed.contains("abababababab") && listed.contains("can't be read: no disk"), "{listed}");
        assert!(list(&[]).starts_with("no disks"));
    }
}
