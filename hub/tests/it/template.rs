//! Data directories with a cluster in them, copied from one that was made before: making one anew syncs
//! forty megabytes to the disk. The template stays beside the test binaries.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use connect_hub::cluster::{Cluster, DataDir};
use tempfile::TempDir;

/// A directory that the user of the database can enter, and a place for the hub in it.
pub(crate) fn empty_place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let data_dir = dir.path().join("hub");
    (dir, data_dir)
}

/// The same with a fresh cluster in it.
pub(crate) async fn place() -> (TempDir, PathBuf) {
    let exe = std::env::current_exe().unwrap();
    // One for each installation of PostgreSQL that the tests were run with.
    let server = std::env::var("CONNECT_HUB_PG_BIN").unwrap_or_default().replace('/', "-");
    let name = format!("hub-test-cluster-{}{server}", nix::unistd::Uid::effective());
    let template = exe.parent().unwrap().join(&name);
    let named = |end: &str| template.with_file_name(format!("{name}.{end}"));
    let lock = File::create(named("lock")).unwrap();
    // Blocks this test's own thread; whoever holds it makes the template or is done with it.
    lock.lock().unwrap();
    if !template.exists() {
        let (_dir, data_dir) = empty_place();
        Cluster::start(DataDir::lock(&data_dir).unwrap()).await.unwrap().stop().await;
        let unfinished = named("new");
        copy(&data_dir.join("postgres"), &unfinished);
        fs::rename(unfinished, &template).unwrap();
    }
    lock.unlock().unwrap();
    let (dir, data_dir) = empty_place();
    fs::create_dir(&data_dir).unwrap();
    copy(&template, &data_dir.join("postgres"));
    (dir, data_dir)
}

/// Copies with owners and modes.
fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success());
}
