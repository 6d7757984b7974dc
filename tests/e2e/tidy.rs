//! The edges between the crates, read from Cargo and from the sources.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What can decrypt, or is made for it.
const CRYPTO: [&str; 6] =
    ["connect-crypto", "snow", "x25519-dalek", "ml-kem", "chacha20poly1305", "aws-lc-rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member of the workspace").to_owned()
}

/// Names of everything that goes into a package's programs.
fn dependencies(package: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "-e", "normal", "--prefix", "none", "-p", package])
        .args(["--format", "{p}"])
        .current_dir(root())
        .output()
        .expect("there is cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("names are UTF-8");
    text.lines().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
}

#[test]
fn hub_has_nothing_that_decrypts() {
    let hub = dependencies("connect-hub");
    assert!(hub.iter().any(|name| name == "connect-spec"), "the list is one: {hub:?}");
    let agent = dependencies("connect-agent");
    for name in CRYPTO {
        assert!(!hub.iter().any(|dependency| dependency == name), "the hub depends on {name}");
        assert!(agent.iter().any(|dependency| dependency == name), "the agent has no {name}");
    }
}

#[test]
fn spec_has_no_secrets_and_nothing_below_crypto_has_io() {
    for package in ["connect-spec", "connect-crypto"] {
        let dependencies = dependencies(package);
        for name in ["tokio", "hyper", "rustls", "nix", "mio", "socket2"] {
            assert!(!dependencies.iter().any(|dependency| dependency == name), "{package}: {name}");
        }
    }
    let spec = dependencies("connect-spec");
    for name in CRYPTO {
        assert!(!spec.iter().any(|dependency| dependency == name), "connect-spec: {name}");
    }
}

/// All Rust sources under a directory.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("a directory of sources").flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "{}", dir.display());
    files
}

/// The lines of a source that are neither tests, which come last, nor comments.
fn product_lines(path: &Path) -> Vec<String> {
    let is_test_file = path.file_name().is_some_and(|name| name == "tests.rs")
        || path.components().any(|part| part.as_os_str() == "tests");
    if is_test_file {
        return Vec::new();
    }
    let text = fs::read_to_string(path).expect("a source is text");
    text.lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .filter(|line| !line.trim_start().starts_with("//"))
        .map(str::to_owned)
        .collect()
}

#[track_caller]
fn check_absent(dir: &str, forbidden: &[&str]) {
    for path in sources(&root().join(dir)) {
        for line in product_lines(&path) {
            for word in forbidden {
                assert!(!line.contains(word), "{}: `{word}` in: {line}", path.display());
            }
        }
    }
}

#[test]
fn engine_has_no_io_and_no_clock() {
    check_absent(
        "agent/src/engine",
        &["tokio", "std::net", "std::fs", "std::thread", "SystemTime", "Instant::now", "getrandom"],
    );
}

#[test]
fn spec_and_crypto_have_no_io_and_no_clock() {
    for dir in ["spec/src", "crypto/src"] {
        check_absent(dir, &["tokio", "std::net", "std::fs", "SystemTime", "Instant::now"]);
    }
}

#[test]
fn only_one_file_of_the_agent_prints() {
    for path in sources(&root().join("agent/src")) {
        let prints = product_lines(&path).iter().any(|line| {
            ["println!", "eprintln!", "print!", "dbg!"].iter().any(|m| line.contains(m))
        });
        assert!(!prints || path.ends_with("agent/src/output.rs"), "{}", path.display());
    }
}

/// Files that Git would take: neither built nor ignored.
fn product_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs = vec![root()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("a directory of ours").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if name == "target" || name == ".git" || name == "corpus" {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files
}

#[test]
fn no_file_names_a_development_machine() {
    // Spelled apart, so that this file holds none of them.
    let roots =
        [["/ho", "me/"], ["/Use", "rs/"], ["/ro", "ot/"], ["/wo", "rk/"], ["/var/t", "mp/"]];
    for path in product_files() {
        // What is no text is a vector or a corpus.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            for place in &roots {
                let place = place.concat();
                let at_start = line.match_indices(&place).any(|(at, _)| {
                    !line[..at]
                        .ends_with(|c: char| c.is_ascii_alphanumeric() || "._-~}$".contains(c))
                });
                assert!(!at_start, "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}
