//! Eyes that look for plain text where there should be none: as it is, in hex, and in base64, however
//! its bytes fall into groups of three.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// What is searched for.
#[derive(Debug)]
pub struct Search {
    needles: Vec<(String, Vec<u8>)>,
    /// The needles that begin with two bytes, by those.
    by_start: Vec<Vec<usize>>,
}

const PIECE_BYTES: usize = 1 << 20;

impl Search {
    /// Searches for these texts.
    #[must_use]
    pub fn new<'t>(texts: impl IntoIterator<Item = &'t [u8]>) -> Self {
        let mut needles = Vec::new();
        for text in texts {
            assert!(text.len() >= 6, "too short to be found only where it was put");
            let name = String::from_utf8_lossy(text).into_owned();
            needles.push((format!("{name} as it is"), text.to_vec()));
            let hex = hex::encode(text);
            needles.push((format!("{name} in HEX"), hex.to_ascii_uppercase().into_bytes()));
            needles.push((format!("{name} in hex"), hex.into_bytes()));
            for skip in 0..3 {
                // Whole groups from the inside of the text: what is around it cannot change them.
                let inner = &text[skip..];
                let inner = &inner[..inner.len() / 3 * 3];
                for (kind, alphabet) in
                    [("base64", base64_simd::STANDARD), ("base64url", base64_simd::URL_SAFE)]
                {
                    let encoded = alphabet.encode_to_string(inner);
                    needles.push((format!("{name} in {kind}"), encoded.into_bytes()));
                }
            }
        }
        let mut by_start = vec![Vec::new(); 1 << 16];
        for (index, (_, needle)) in needles.iter().enumerate() {
            by_start[start(needle)].push(index);
        }
        Self { needles, by_start }
    }

    /// What is found in these bytes.
    #[must_use]
    pub fn bytes(&self, haystack: &[u8]) -> Vec<String> {
        let mut hits = Vec::new();
        for (at, pair) in haystack.windows(2).enumerate() {
            for &index in &self.by_start[start(pair)] {
                let (name, needle) = &self.needles[index];
                if haystack[at..].starts_with(needle) && !hits.contains(name) {
                    hits.push(name.clone());
                }
            }
        }
        hits
    }

    fn longest(&self) -> usize {
        self.needles.iter().map(|(_, needle)| needle.len()).max().unwrap_or_default()
    }

    /// What is found in every file under a directory, and how many bytes that were.
    #[must_use]
    pub fn dir(&self, dir: &Path) -> (Vec<String>, u64) {
        let (mut hits, mut total) = (Vec::new(), 0);
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    dirs.push(path);
                } else if let Ok(bytes) = fs::read(&path) {
                    total += bytes.len() as u64;
                    hits.extend(
                        self.bytes(&bytes)
                            .into_iter()
                            .map(|hit| format!("{hit}: {}", path.display())),
                    );
                }
            }
        }
        (hits, total)
    }

    /// What is found in a process's memory, and how many bytes that were. Memory that it shares with
    /// others is read only if `shared`.
    ///
    /// # Errors
    /// When the system does not let us look.
    pub fn memory(&self, id: u32, shared: bool) -> io::Result<(Vec<String>, u64)> {
        let (mut hits, mut total) = (Vec::new(), 0);
        let memory = File::open(format!("/proc/{id}/mem"))?;
        let mut piece = vec![0; PIECE_BYTES + self.longest()];
        for line in fs::read_to_string(format!("/proc/{id}/maps"))?.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(rights)) = (fields.next(), fields.next()) else {
                continue;
            };
            // What comes from a program's file was there before anything of ours.
            let from_file = fields.nth(3).is_some_and(|path| path.starts_with("/usr/"));
            let private = rights.ends_with('p');
            if !rights.starts_with('r') || from_file && !rights.contains('w') || !private && !shared
            {
                continue;
            }
            let Some((Ok(mut from), Ok(to))) = range
                .split_once('-')
                .map(|(from, to)| (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)))
            else {
                continue;
            };
            while from < to {
                let most = usize::try_from(to - from).map_or(piece.len(), |n| n.min(piece.len()));
                // Some ranges cannot be read, such as the kernel's own.
                let Ok(length) = memory.read_at(&mut piece[..most], from) else {
                    break;
                };
                if piece[..length].iter().any(|byte| *byte != 0) {
                    hits.extend(
                        self.bytes(&piece[..length])
                            .into_iter()
                            .map(|hit| format!("{hit}: process {id}, {line}")),
                    );
                }
                total += length as u64;
                // The pieces overlap, so that nothing hides between two.
                let step = if length > self.longest() { length - self.longest() } else { length };
                if step == 0 {
                    break;
                }
                from += step as u64;
                if length == most && most < piece.len() {
                    break;
                }
            }
        }
        Ok((hits, total))
    }
}

fn start(bytes: &[u8]) -> usize {
    usize::from(bytes[0]) << 8 | usize::from(bytes[1])
}

/// A process and all that descend from it.
#[must_use]
pub fn family(id: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(PathBuf::from("/proc").join(format!("{id}/status")));
            let parent = status.ok()?.lines().find_map(|line| {
                line.strip_prefix("PPid:").and_then(|parent| parent.trim().parse().ok())
            })?;
            Some((id, parent))
        })
        .collect();
    let mut family = vec![id];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        family.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(id, _)| *id));
        next += 1;
    }
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_finds_every_spelling_at_every_place() {
        let text = b"canary-0123456789";
        let search = Search::new([text.as_slice()]);
        let around = b"lorem ipsum";
        for before in 0..8 {
            let hidden = [&around[..before], text, around].concat();
            assert!(!search.bytes(&hidden).is_empty(), "raw, {before}");
            assert!(!search.bytes(hex::encode(&hidden).as_bytes()).is_empty(), "hex, {before}");
            let upper = hex::encode_upper(&hidden);
            assert!(!search.bytes(upper.as_bytes()).is_empty(), "HEX, {before}");
            let encoded = base64_simd::STANDARD_NO_PAD.encode_to_string(&hidden);
            assert!(!search.bytes(encoded.as_bytes()).is_empty(), "base64, {before}");
        }
        assert!(search.bytes(b"canary-012345678").is_empty());
        assert!(search.bytes(b"").is_empty());
    }

    #[test]
    fn search_finds_what_this_process_remembers() {
        let canary = crate::random_word();
        let search = Search::new([canary.as_bytes()]);
        let (hits, total) = search.memory(std::process::id(), true).expect("our own memory");
        assert!(!hits.is_empty() && total > 0);
    }
}
