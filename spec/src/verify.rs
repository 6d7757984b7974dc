//! What two people compare to know that their agents mean each other. PROTOCOL.md, "Comparing".

use std::fmt;

use sha2::{Digest, Sha512};

use crate::{ids::WorkspaceId, keys::IdentityKey};

/// First bytes of what is hashed.
const LABEL: &[u8] = b"connect/v1 verify";
/// Groups of digits for each agent.
const GROUPS: usize = 6;
/// Bytes of the hash for each group.
const GROUP_BYTES: usize = 5;
/// Digits of a group.
const GROUP_DIGITS: usize = 5;

/// 60 digits that stand for two agents of a workspace, the same on both sides.
///
/// Each half is made of one agent's identity key alone, so whoever wants to pass for an agent has to find
/// a key whose 30 digits are the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetyNumber(String);

impl SafetyNumber {
    /// The number of two agents, in either order.
    #[must_use]
    pub fn of(workspace: &WorkspaceId, one: &IdentityKey, other: &IdentityKey) -> Self {
        let mut halves = [one, other].map(|key| half(workspace, key));
        halves.sort();
        Self(halves.concat())
    }

    /// The digits, without spaces.
    #[must_use]
    pub fn digits(&self) -> &str {
        &self.0
    }
}

/// In groups of five, for people.
impl fmt::Display for SafetyNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, digit) in self.0.chars().enumerate() {
            if index > 0 && index % GROUP_DIGITS == 0 {
                f.write_str(" ")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// The 30 digits of one agent.
fn half(workspace: &WorkspaceId, identity: &IdentityKey) -> String {
    let hash = Sha512::new()
        .chain_update(LABEL)
        .chain_update([0])
        .chain_update(workspace.0)
        .chain_update(identity.0)
        .finalize();
    hash.chunks_exact(GROUP_BYTES)
        .take(GROUPS)
        .map(|group| {
            let number = group.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
            format!("{:05}", number % 100_000)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: IdentityKey = IdentityKey([1; 32]);
    const OTHER: IdentityKey = IdentityKey([2; 32]);

    fn workspace() -> WorkspaceId {
        WorkspaceId(std::array::from_fn(|index| u8::try_from(index).expect("below 32")))
    }

    #[test]
    fn two_agents_have_these_digits() {
        let number = SafetyNumber::of(&workspace(), &ONE, &OTHER);
        assert_eq!(number.digits(), "185871744016176212293703976055614917444858587656251156894833");
        assert_eq!(
            number.to_string(),
            "18587 17440 16176 21229 37039 76055 61491 74448 58587 65625 11568 94833"
        );
    }

    #[test]
    fn both_sides_have_the_same_digits_and_others_have_others() {
        let number = |workspace: &WorkspaceId, one, other| SafetyNumber::of(workspace, one, other);
        let expected = number(&workspace(), &ONE, &OTHER);
        assert_eq!(number(&workspace(), &OTHER, &ONE), expected);
        assert_ne!(number(&WorkspaceId([0; 32]), &ONE, &OTHER), expected);
        let third = IdentityKey([3; 32]);
        let with_third = number(&workspace(), &ONE, &third);
        assert_ne!(with_third, expected);
        // The half of the agent that both have in common is the same.
        let one = half(&workspace(), &ONE);
        assert!(expected.digits().contains(&one) && with_third.digits().contains(&one));
    }
}
