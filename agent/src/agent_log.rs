//! The log of an agent that has no terminal: `agent.log` in the home, kept to a size, and read again.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use connect_agent::{Error, ErrorKind, Home, Result};

use crate::output::{self, Output};

const FILE: &str = "agent.log";
/// A file that would grow beyond this is renamed, and a new one begun: days of warnings, or minutes of `debug`.
const MAX_BYTES: u64 = 5 * 1024 * 1024;
/// Older files that are kept: `agent.log.1` and `agent.log.2`.
const OLDER: usize = 2;
/// `--follow` looks for more this often.
const FOLLOW_PAUSE: Duration = Duration::from_millis(300);

/// Where the log of a home is, and `.1`, `.2` behind it for what is older.
pub(crate) fn path(home: &Home) -> PathBuf {
    home.dir().join(FILE)
}

fn numbered(path: &Path, number: usize) -> PathBuf {
    if number == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// A file that renames itself away when it is full. Each write is one event of the log, and stays whole.
#[derive(Debug)]
pub(crate) struct RotatingFile {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl RotatingFile {
    /// Goes on with the log of a home, or begins it.
    ///
    /// # Errors
    /// The home cannot be written.
    pub(crate) fn open(home: &Home) -> io::Result<Self> {
        Self::with_limit(path(home), MAX_BYTES)
    }

    fn with_limit(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = append_to(&path)?;
        let size = file.metadata()?.len();
        Ok(Self { path, file, size, limit })
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (0..OLDER).rev() {
            match fs::rename(numbered(&self.path, number), numbered(&self.path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        self.file = append_to(&self.path)?;
        Ok(())
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

impl Write for RotatingFile {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let length = u64::try_from(event.len()).unwrap_or(u64::MAX);
        if self.size > 0 && self.size.saturating_add(length) > self.limit {
            // Where renaming fails the file grows on: a long log is better than none. The next try comes
            // when as much has been written again.
            let _ = self.rotate();
            self.size = 0;
        }
        self.file.write_all(event)?;
        self.size = self.size.saturating_add(length);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Prints the last lines of the log, and with `follow` what is added, until the reader goes away.
pub(crate) async fn show(home: &Home, lines: usize, follow: bool, output: Output) -> Result<()> {
    let path = path(home);
    let mut reader = Reader { path: path.clone(), open: None };
    let read = reader.older().and_then(|mut all| {
        all.extend(reader.more()?);
        Ok(all)
    });
    let all = read.map_err(|error| home.unreadable(FILE, &error))?;
    if all.is_empty() && !follow {
        return Err(Error::new(
            ErrorKind::Other,
            format_args!("there is no log in `{}`", path.display()),
        )
        .hint(
            "an agent that `connect up --detach` or `connect daemon install` started writes one; in the \
             foreground it is what is on the terminal",
        ));
    }
    output.log_lines(last_lines(&all, lines));
    let mut rest = Vec::new();
    while follow && output::is_read() {
        tokio::time::sleep(FOLLOW_PAUSE).await;
        rest.extend(reader.more()?);
        // A line is printed when it is whole.
        let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let next = rest.split_off(whole);
        output.log_lines(&rest);
        rest = next;
    }
    Ok(())
}

fn last_lines(text: &[u8], lines: usize) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    match lines.checked_sub(1) {
        Some(before) => ends.nth(before).map_or(text, |(at, _)| &text[at + 1..]),
        None => &[],
    }
}

/// Reads the log while it is written and renamed.
struct Reader {
    path: PathBuf,
    /// The file whose end was read last.
    open: Option<File>,
}

impl Reader {
    /// What is in the older files; opens the newest.
    fn older(&mut self) -> io::Result<Vec<u8>> {
        self.open = open(&self.path)?;
        let newest = self.open.as_ref().map(identity).transpose()?;
        let mut text = Vec::new();
        for number in (1..=OLDER).rev() {
            if let Some(mut file) = open(&numbered(&self.path, number))?
                // Renamed just now: it is read as the newest.
                && Some(identity(&file)?) != newest
            {
                file.read_to_end(&mut text)?;
            }
        }
        Ok(text)
    }

    /// What was written since the last time, through all files that it went to.
    fn more(&mut self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        loop {
            let Some(file) = &mut self.open else {
                self.open = open(&self.path)?;
                if self.open.is_none() {
                    return Ok(text);
                }
                continue;
            };
            // Looked up before the reading: what is renamed afterwards is found the next time.
            let own = identity(file)?;
            let place = (0..=OLDER).find(|number| {
                fs::metadata(numbered(&self.path, *number))
                    .is_ok_and(|at| (at.dev(), at.ino()) == own)
            });
            file.read_to_end(&mut text)?;
            let next = match place {
                Some(0) => return Ok(text),
                Some(number) => number - 1,
                // So much came that the file is gone: on with the oldest that there is.
                None => OLDER,
            };
            let next =
                (0..=next).rev().find_map(|number| open(&numbered(&self.path, number)).transpose());
            match next {
                Some(file) => self.open = Some(file?),
                None => return Ok(text),
            }
        }
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u32) -> String {
        format!("event {number:06}\n")
    }

    #[test]
    fn follower_misses_nothing_while_files_are_renamed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE);
        let mut log = RotatingFile::with_limit(path.clone(), 100).expect("a file");
        let mut reader = Reader { path, open: None };
        let mut seen = reader.older().expect("nothing");
        let mut expected = String::new();
        for number in 0..500 {
            log.write_all(event(number).as_bytes()).expect("written");
            expected.push_str(&event(number));
            // Seven events are a file, so at most two renames lie between two looks.
            if number % 13 == 0 {
                seen.extend(reader.more().expect("read"));
            }
        }
        seen.extend(reader.more().expect("read"));
        assert_eq!(String::from_utf8(seen).expect("text"), expected);
    }

    #[test]
    fn files_stay_small_private_and_few() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE);
        for run in 0..3 {
            let mut log = RotatingFile::with_limit(path.clone(), 100).expect("a file");
            for number in 0..40 {
                log.write_all(event(run * 100 + number).as_bytes()).expect("written");
            }
        }
        let mut files: Vec<_> = fs::read_dir(dir.path()).expect("ours").flatten().collect();
        files.sort_by_key(fs::DirEntry::file_name);
        assert_eq!(files.len(), OLDER + 1);
        for file in &files {
            let metadata = file.metadata().expect("it is there");
            assert!(metadata.len() <= 100, "{file:?}");
            assert_eq!(metadata.mode() & 0o777, 0o600, "{file:?}");
        }
        let mut reader = Reader { path, open: None };
        let mut all = reader.older().expect("read");
        all.extend(reader.more().expect("read"));
        assert!(String::from_utf8(all.clone()).expect("text").ends_with(&event(239)));
        assert_eq!(last_lines(&all, 2), [event(238), event(239)].concat().as_bytes());
        assert_eq!(last_lines(&all, 0), b"");
        assert_eq!(last_lines(&all, 10_000), all);
        assert_eq!(last_lines(b"a\nb", 1), b"b");
    }

    #[test]
    fn directory_that_takes_no_new_file_loses_no_event() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE);
        // Directories in the way of each rename.
        for number in 1..=OLDER {
            fs::create_dir_all(numbered(&path, number).join("full")).expect("our own directory");
        }
        let mut log = RotatingFile::with_limit(path.clone(), 100).expect("a file");
        let written: String = (0..50).map(event).collect();
        for number in 0..50 {
            log.write_all(event(number).as_bytes()).expect("written");
        }
        assert_eq!(fs::read_to_string(&path).expect("text"), written);
    }
}
