//! Where passphrases come from: a file, stdin or the terminal. Never from an argument or the environment,
//! which other processes can see.

use std::{
    fs::File,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
};

use connect_agent::{Error, ErrorKind, Passphrase, Result};
use zeroize::Zeroizing;

/// A file that is longer holds no passphrase.
const MAX_FILE_BYTES: usize = 4096;

/// How the user gives the passphrase of the signer key.
#[derive(Debug, Clone, Default)]
pub(crate) struct Source {
    /// `--passphrase-file`; `-` is stdin.
    pub(crate) file: Option<PathBuf>,
}

impl Source {
    /// The passphrase that opens the signer key.
    pub(crate) fn current(&self) -> Result<Passphrase> {
        match &self.file {
            Some(file) => read(file),
            None => ask("Passphrase of the signer key: "),
        }
    }

    /// A new passphrase, typed twice; or the one of a file.
    pub(crate) fn new_one(file: Option<&Path>) -> Result<Passphrase> {
        if let Some(file) = file {
            return read(file);
        }
        let first = typed("New passphrase: ", "--new-passphrase-file")?;
        if *first != *typed("The same again: ", "--new-passphrase-file")? {
            return Err(Error::new(ErrorKind::Usage, "the two passphrases differ"));
        }
        passphrase(first)
    }
}

fn passphrase(text: Zeroizing<String>) -> Result<Passphrase> {
    Passphrase::new(text).map_err(|error| Error::new(ErrorKind::Usage, error))
}

/// The first line of a file, or of stdin for `-`.
fn read(file: &Path) -> Result<Passphrase> {
    let cannot = |error: &dyn std::fmt::Display| {
        Error::new(
            ErrorKind::Usage,
            format_args!("cannot read a passphrase from `{}`: {error}", file.display()),
        )
    };
    // Reserved at once, so that growing leaves no copy.
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE_BYTES));
    let limit = MAX_FILE_BYTES as u64;
    let read = if file == Path::new("-") {
        std::io::stdin().take(limit).read_to_string(&mut text)
    } else {
        File::open(file).and_then(|file| file.take(limit).read_to_string(&mut text))
    };
    read.map_err(|error| cannot(&error))?;
    let end = text.find(['\r', '\n']).unwrap_or(text.len());
    text.truncate(end);
    passphrase(text)
}

fn ask(prompt: &str) -> Result<Passphrase> {
    passphrase(typed(prompt, "--passphrase-file")?)
}

/// What is typed on the terminal, without echo.
fn typed(prompt: &str, instead: &str) -> Result<Zeroizing<String>> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(
            ErrorKind::Usage,
            "a passphrase is needed, and there is no terminal to ask for it",
        )
        .hint(format_args!("give it with `{instead} FILE`; `-` reads it from stdin")));
    }
    let typed = rpassword::prompt_password(prompt).map_err(Error::from)?;
    Ok(Zeroizing::new(typed))
}
