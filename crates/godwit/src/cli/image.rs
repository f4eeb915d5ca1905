//! `godwit image`: what machines' disks begin as.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use godwit_block::{
    ImageFile, ImageFileError, ImageFormat,
    repository::{Image, ImageName, Repository, RepositoryError},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{
    arguments::{Format, ImageVerb, Images},
    exit::Failure,
};
use crate::{
    api::{Problem, ProblemCode},
    output::{Output, one_line, table},
    quantity::size,
};

/// What is shown while something takes its time.
const BAR: &str = "{msg} {wide_bar} {percent}% {eta} left";

/// Does what is asked with the images of a repository.
pub(super) async fn run(images: Images, output: Output) -> Result<(), Failure> {
    let repository = Repository::open(&images.repository, std::env::vars())?;
    match images.verb {
        ImageVerb::Import { file, name, format } => import(&repository, &file, name, format, output).await,
        ImageVerb::Ls => list(&repository, output).await,
        ImageVerb::Rm { name } => remove(&repository, &name, output).await,
        ImageVerb::Verify { name } => verify(&repository, name, output).await,
    }
}

async fn import(
    repository: &Repository,
    file: &Path,
    name: ImageName,
    format: Option<Format>,
    output: Output,
) -> Result<(), Failure> {
    let source = ImageFile::open(file, format.map(ImageFormat::from)).await?;
    let bar = bar(format!("importing {name}"), output);
    let imported = repository.import(&name, Arc::new(source), |progress| {
        bar.set_length(progress.total.into());
        bar.set_position(progress.done.into());
    });
    let imported = imported.await;
    bar.finish_and_clear();
    let imported = imported?;
    let told = json!({
        "name": name,
        "manifest": imported.image.manifest,
        "size_bytes": imported.image.size_bytes,
        "content_bytes": imported.image.content_bytes,
        "new_bytes": imported.new_bytes,
        "known_chunks": imported.known_chunks,
    });
    output.answer(&told, |_| {
        format!(
            "{name}: {}, {} of it content; {} more in the repository, {} chunks were there already",
            size(imported.image.size_bytes),
            size(imported.image.content_bytes),
            size(imported.new_bytes),
            imported.known_chunks
        )
    });
    Ok(())
}

async fn list(repository: &Repository, output: Output) -> Result<(), Failure> {
    let images: BTreeMap<String, Image> =
        repository.images().await?.into_iter().map(|(name, image)| (name.into(), image)).collect();
    output.answer(&images, |images| {
        if images.is_empty() {
            return "no images; bring one with `godwit image import FILE --name NAME`".to_owned();
        }
        let rows: Vec<_> = images
            .iter()
            .map(|(name, image)| {
                let id = image.manifest.get(..12).unwrap_or(&image.manifest).to_owned();
                [name.clone(), size(image.size_bytes), size(image.content_bytes), id]
            })
            .collect();
        table(["NAME", "SIZE", "CONTENT", "ID"], &rows)
    });
    Ok(())
}

async fn remove(repository: &Repository, name: &ImageName, output: Output) -> Result<(), Failure> {
    let swept = repository.remove(name).await?;
    let told = json!({ "removed": name, "chunks": swept.chunks, "bytes": swept.bytes });
    output.answer(&told, |_| {
        format!("removed {name}; {} given back ({} chunks)", size(swept.bytes), swept.chunks)
    });
    Ok(())
}

async fn verify(repository: &Repository, name: Option<ImageName>, output: Output) -> Result<(), Failure> {
    let images = match name {
        Some(name) => vec![(name.clone(), repository.image(&name).await?)],
        None => repository.images().await?,
    };
    let mut told = BTreeMap::new();
    let mut bad_chunks = 0;
    for (name, image) in images {
        let bar = bar(format!("verifying {name}"), output);
        let verified = repository.verify(&image, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        let verified = verified.await;
        bar.finish_and_clear();
        let verified = verified?;
        bad_chunks += verified.bad_chunks;
        told.insert(
            name.to_string(),
            json!({ "good_chunks": verified.good_chunks, "bad_chunks": verified.bad_chunks, "problems": verified.problems }),
        );
    }
    output.answer(&told, |told| {
        let line = |(name, verified): (&String, &serde_json::Value)| {
            format!("{name}: {} chunks whole, {} not", verified["good_chunks"], verified["bad_chunks"])
        };
        told.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    if bad_chunks == 0 {
        return Ok(());
    }
    let first = told.values().find_map(|verified| verified["problems"][0].as_str()).unwrap_or_default();
    Err(Failure::failed(format!("{bad_chunks} chunks are not what they should be; the first: {first}")))
}

pub(super) fn bar(message: String, output: Output) -> ProgressBar {
    let bar = if output.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    if let Ok(style) = ProgressStyle::with_template(BAR) {
        bar.set_style(style);
    }
    bar.with_message(message)
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<RepositoryError> for Failure {
    fn from(error: RepositoryError) -> Self {
        let code = match &error {
            RepositoryError::Location { .. } | RepositoryError::Name(_) => ProblemCode::Invalid,
            RepositoryError::Exists(_) | RepositoryError::Busy(_) => ProblemCode::Refused,
            RepositoryError::NoImage(_) => ProblemCode::NotFound,
            _ => ProblemCode::Failed,
        };
        Self::Problem(Problem { code, message: one_line(&error) })
    }
}

impl From<ImageFileError> for Failure {
    fn from(error: ImageFileError) -> Self {
        Self::invalid(one_line(&error))
    }
}
