//! A workspace's id as words that people can compare. PROTOCOL.md, "Comparing".

use bip39::Language;
use connect_spec::ids::WorkspaceId;

/// Words of a workspace: 88 bits of its id.
pub const WORKSPACE_WORDS: usize = 8;
/// Bits of a word: the list has 2048.
const WORD_BITS: usize = 11;

/// The first 88 bits of the id, eleven bits each, as words of the BIP-39 English list. Public.
#[must_use]
pub fn workspace_words(workspace: &WorkspaceId) -> [&'static str; WORKSPACE_WORDS] {
    let list = Language::English.word_list();
    let bit = |index: usize| usize::from(workspace.0[index / 8] >> (7 - index % 8) & 1);
    std::array::from_fn(|word| {
        let first = word * WORD_BITS;
        list[(first..first + WORD_BITS).fold(0, |number, index| number << 1 | bit(index))]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(workspace: [u8; 32], words: &str) {
        assert_eq!(workspace_words(&WorkspaceId(workspace)).join(" "), words);
    }

    #[test]
    fn workspaces_have_these_words() {
        check([0; 32], &["abandon"; 8].join(" "));
        check([255; 32], &["zoo"; 8].join(" "));
        let ascending = std::array::from_fn(|index| u8::try_from(index).expect("below 32"));
        check(ascending, "abandon amount liar amount expire adjust cage candy");
    }

    #[test]
    fn only_the_first_88_bits_count() {
        let mut workspace = [0; 32];
        workspace[11] = 128;
        check(workspace, &["abandon"; 8].join(" "));
        workspace[10] = 1;
        check(workspace, &format!("{} ability", ["abandon"; 7].join(" ")));
    }
}
