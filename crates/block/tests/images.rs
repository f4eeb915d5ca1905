//! Images made by qemu-img, brought into a repository in a directory and read back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, process::Command, sync::Arc};

use godwit_block::{
    Base, CHUNK_BYTES, Checked, ChunkIndex, Disk, DiskId, ImageFile, ImageFileError, ImageFormat, Origin,
    Outcome, WholeError,
    repository::{Image, ImageName, Imported, Repository, RepositoryError, manifest::ChunkDigest},
};

const SIZE_BYTES: usize = 10 * CHUNK_BYTES as usize + 1536;

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Content in some chunks, none in others, and the same in two.
fn content() -> Vec<u8> {
    let mut content = vec![0; SIZE_BYTES];
    let chunk = CHUNK_BYTES as usize;
    fastrand::Rng::with_seed(3).fill(&mut content[..chunk]);
    content.copy_within(..chunk, 4 * chunk);
    content[6 * chunk + 5] = 1;
    content[SIZE_BYTES - 1] = 2;
    content
}

fn name(name: &str) -> ImageName {
    name.to_owned().try_into().unwrap()
}

async fn import(repository: &Repository, image: &str, file: &Path) -> Result<Imported, RepositoryError> {
    let source = ImageFile::open(file, None).await.unwrap();
    repository.import(&name(image), Arc::new(source), |_| {}).await
}

async fn read_back(repository: &Repository, image: &Image) -> Vec<u8> {
    let manifest = repository.manifest(image).await.unwrap();
    let mut content = vec![0; manifest.geometry().size_bytes() as usize];
    for (chunk, digest) in manifest.content() {
        let bytes = repository.chunk(digest).await.unwrap();
        content[chunk.offset() as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    content
}

fn repository(directory: &Path) -> Repository {
    Repository::open(directory.join("repository").to_str().unwrap(), []).unwrap()
}

#[tokio::test]
async fn raw_and_qcow2_become_the_same_image_and_share_their_chunks() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (directory.path().join("a.raw"), directory.path().join("a.qcow2"));
    std::fs::write(&raw, content()).unwrap();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let repository = repository(directory.path());

    let first = import(&repository, "raw", &raw).await.unwrap();
    let second = import(&repository, "qcow2", &qcow2).await.unwrap();

    assert_eq!(first.image, second.image);
    assert_eq!((first.known_chunks, second.known_chunks, second.new_bytes), (1, 4, 0));
    assert_eq!(first.image.content_bytes, 3 * CHUNK_BYTES + 1536);
    assert!(read_back(&repository, &first.image).await == content());
    let images = repository.images().await.unwrap();
    assert_eq!(images.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>(), ["qcow2", "raw"]);
}

#[tokio::test]
async fn what_lies_beneath_a_qcow2_is_followed_if_one_says_so_and_never_in_circles() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("base.raw"), content()).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &path("base.raw"), "-F", "raw", &path("top.qcow2")]);
    let guessed = ImageFile::open(Path::new(&path("top.qcow2")), None).await;
    assert!(matches!(guessed, Err(ImageFileError::Ambiguous(_))), "{guessed:?}");

    let told = ImageFile::open(Path::new(&path("top.qcow2")), Some(ImageFormat::Qcow2)).await.unwrap();
    let repository = repository(directory.path());
    let imported = repository.import(&name("top"), Arc::new(told), |_| {}).await.unwrap();
    assert!(read_back(&repository, &imported.image).await == content());

    qemu_img(&["create", "-q", "-f", "qcow2", &path("x.qcow2"), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &path("x.qcow2"), "-F", "qcow2", &path("y.qcow2")]);
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", &path("y.qcow2"), "-F", "qcow2", &path("x.qcow2")]);
    let circle = ImageFile::open(Path::new(&path("x.qcow2")), Some(ImageFormat::Qcow2)).await.unwrap_err();
    let causes = format!("{:?}", circle);
    assert!(causes.contains("beneath itself"), "{causes}");
}

#[tokio::test]
async fn an_encrypted_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let arguments = ["create", "-q", "--object", "secret,id=key,data=abc", "-f", "qcow2", "-o", options];
    qemu_img(&[&arguments[..], &[path.to_str().unwrap(), "1M"]].concat());
    let refused = ImageFile::open(&path, None).await.unwrap_err();
    assert!(format!("{refused:?}").contains("encrypted"), "{refused:?}");
}

#[tokio::test]
async fn what_no_image_has_any_more_goes_with_the_last_that_had_it() {
    let directory = tempfile::tempdir().unwrap();
    let repository = repository(directory.path());
    let (one, two) = (directory.path().join("one"), directory.path().join("two"));
    std::fs::write(&one, content()).unwrap();
    let mut other = content();
    other[7 * CHUNK_BYTES as usize] = 9;
    std::fs::write(&two, other).unwrap();
    let kept = import(&repository, "one", &one).await.unwrap();
    import(&repository, "two", &two).await.unwrap();

    assert!(matches!(import(&repository, "one", &two).await, Err(RepositoryError::Exists(_))));
    assert_eq!(repository.remove(&name("two")).await.unwrap().chunks, 1);
    assert!(read_back(&repository, &kept.image).await == content());
    assert_eq!(repository.remove(&name("one")).await.unwrap().chunks, 3);
    assert!(matches!(repository.remove(&name("one")).await, Err(RepositoryError::NoImage(_))));
}

/// A disk of the image "disk", larger than that, of which two chunks are copied, one of them written to in part.
async fn disk(directory: &Path, repository: &Repository) -> (std::path::PathBuf, Vec<u8>) {
    let raw = directory.join("raw");
    std::fs::write(&raw, content()).unwrap();
    let image = import(repository, "disk", &raw).await.unwrap().image;
    let manifest = repository.manifest(&image).await.unwrap();
    let path = directory.join("disk");
    Disk::create(&path, DiskId([5; 16]), Some(20 * CHUNK_BYTES), &Origin::Image(manifest)).unwrap();
    let mut disk = Disk::open(&path, Some(repository.clone())).await.unwrap();
    for chunk in [0, 6].map(ChunkIndex) {
        let content = disk.base.as_ref().unwrap().fetch(chunk).await.unwrap();
        assert_eq!(disk.store.fill(chunk, &content).unwrap(), Outcome::Done);
    }
    let mut now = content();
    now.resize(20 * CHUNK_BYTES as usize, 0);
    for offset in [6 * CHUNK_BYTES + 8192, 15 * CHUNK_BYTES] {
        assert_eq!(disk.store.write(offset, &[7; 4096]).unwrap(), Outcome::Done);
        now[offset as usize..][..4096].fill(7);
    }
    disk.close().unwrap();
    (path, now)
}

#[tokio::test]
async fn a_disk_is_exported_as_its_machine_sees_it() {
    let directory = tempfile::tempdir().unwrap();
    let repository = repository(directory.path());
    let (path, now) = disk(directory.path(), &repository).await;
    let disk = Disk::open(&path, Some(repository)).await.unwrap();
    let file = directory.path().join("exported");
    disk.export(&file, |_, _| {}).await.unwrap();
    assert!(std::fs::read(&file).unwrap() == now);
    let again = disk.export(&file, |_, _| {}).await;
    assert!(matches!(again, Err(WholeError::Exists(_))), "{again:?}");
}

#[tokio::test]
async fn what_was_left_of_a_disk_that_was_being_made_is_in_nobodys_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::create_dir(directory.path().join(".disk")).unwrap();
    std::fs::write(directory.path().join(".disk/map.0"), "half of it").unwrap();
    let create = || Disk::create(&path, DiskId([5; 16]), Some(1 << 20), &Origin::Nothing);
    create().unwrap();
    assert!(create().is_err());
    Disk::open(&path, None).await.unwrap().close().unwrap();
    godwit_block::disk::remove(&path).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn copies_of_an_image_that_rot_are_found_and_fetched_anew() {
    let directory = tempfile::tempdir().unwrap();
    let repository = repository(directory.path());
    let (path, now) = disk(directory.path(), &repository).await;
    let data = path.join("data");
    // A copy of a whole chunk, one beside what the disk wrote itself, and that.
    for at in [1000, 6 * CHUNK_BYTES as usize + 5, 6 * CHUNK_BYTES as usize + 8192] {
        let mut bytes = std::fs::read(&data).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&data, bytes).unwrap();
    }
    let mut disk = Disk::open(&path, Some(repository)).await.unwrap();
    let found = disk.check(false, |_, _| {}).await.unwrap();
    assert_eq!((found.good_chunks, found.bad_chunks, found.repaired_chunks), (0, 2, 0));
    assert!(found.problems[0].starts_with("chunk 0: "), "{found:?}");
    assert_eq!(disk.check(true, |_, _| {}).await.unwrap().repaired_chunks, 2);
    let right = Checked { good_chunks: 2, ..Checked::default() };
    assert_eq!(disk.check(false, |_, _| {}).await.unwrap(), right);
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[6 * CHUNK_BYTES as usize + 8192] ^= 1;
    assert!(
        bytes[..2 * 4096] == now[..2 * 4096]
            && bytes[6 * CHUNK_BYTES as usize..][..16384] == now[6 * CHUNK_BYTES as usize..][..16384]
    );
}

#[tokio::test]
async fn whatever_is_missing_or_damaged_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let repository = repository(directory.path());
    let raw = directory.path().join("raw");
    std::fs::write(&raw, content()).unwrap();
    let image = import(&repository, "raw", &raw).await.unwrap().image;
    let digest = repository.manifest(&image).await.unwrap().digest(ChunkIndex(0));
    let hex: String = digest.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let chunk = directory.path().join("repository/chunks").join(&hex[..2]).join(&hex);

    let mut bytes = std::fs::read(&chunk).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&chunk, bytes).unwrap();
    let error = repository.chunk(digest).await.unwrap_err().to_string();
    assert!(error.contains(&hex) && error.contains("damaged"), "{error}");

    std::fs::remove_file(&chunk).unwrap();
    let error = repository.chunk(digest).await.unwrap_err().to_string();
    assert!(error.contains(&hex) && error.contains("missing"), "{error}");
    assert_ne!(digest, ChunkDigest::ZERO);
}

#[test]
fn a_name_is_no_path() {
    for wrong in ["../x", "a/b", "", ".hidden", "Debian", &"x".repeat(64), "a b"] {
        assert!(ImageName::try_from(wrong.to_owned()).is_err(), "{wrong:?}");
    }
    assert!(ImageName::try_from("debian-12.5_x".to_owned()).is_ok());
}
