//! Where a repository is.

use std::{path::PathBuf, sync::Arc};

use object_store::{ObjectStoreScheme, local::LocalFileSystem, parse_url_opts, path::Path};

use super::{Repository, RepositoryError};

impl Repository {
    /// The repository at `location`: an absolute path of a directory, which is made if it isn't there, or
    /// `s3://bucket/prefix`. `settings` are those of the environment and of files: `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT`, `AWS_REGION` and their like.
    ///
    /// # Errors
    /// [`RepositoryError::Location`] says what is wrong with it.
    pub fn open(
        location: &str,
        settings: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, RepositoryError> {
        let wrong = |problem: String| RepositoryError::Location { location: location.to_owned(), problem };
        if location.starts_with('/') {
            let directory = PathBuf::from(location);
            std::fs::create_dir_all(&directory).map_err(|error| wrong(error.to_string()))?;
            let store =
                LocalFileSystem::new_with_prefix(&directory).map_err(|error| wrong(error.to_string()))?;
            return Ok(Self { store: Arc::new(store), prefix: Path::default(), directory: Some(directory) });
        }
        let url = url::Url::parse(location)
            .map_err(|_| wrong("it is neither an absolute path nor an URL".into()))?;
        match ObjectStoreScheme::parse(&url) {
            Ok((ObjectStoreScheme::AmazonS3, _)) => {}
            _ => return Err(wrong("only s3:// is known besides directories".into())),
        }
        let (store, prefix) = parse_url_opts(&url, settings).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { store: store.into(), prefix, directory: None })
    }
}
