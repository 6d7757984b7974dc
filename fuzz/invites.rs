//! Codes of invites and shares, and hub addresses.

use bech32::{
    Bech32m, Fe32IterExt as _, Hrp,
    primitives::{decode::CheckedHrpstring, iter::ByteIterExt as _},
};
use connect_crypto::{
    epoch::ShareSecret,
    invite::{HubAddress, Invite, InviteError, ShareGrant},
};
use connect_spec::limits::MAX_INVITE_CHARS;

use crate::world::{World, secret};

/// A line with a checksum that holds.
fn line(body: &[u8]) -> String {
    let hrp = Hrp::parse_unchecked("pc");
    body.iter().copied().bytes_to_fes().with_checksum::<Bech32m>(&hrp).chars().collect()
}

fn address(text: &str) {
    if let Ok(address) = text.parse::<HubAddress>() {
        assert_eq!(address.to_string(), text, "an address has one spelling");
    }
}

/// A code that is taken has one spelling, and none of its neighbours is a code.
fn code(text: &str) {
    let Ok(invite) = text.parse::<Invite>() else { return };
    let shown = invite.reveal();
    assert_eq!(*shown, text.trim());
    assert!(shown.len() <= MAX_INVITE_CHARS);
    let again: Invite = shown.parse().expect("what is shown can be read");
    assert_eq!(*again.reveal(), *shown);
    assert_eq!(again.share.is_some(), invite.share.is_some());
    // Bech32m finds up to three wrong characters: one is the least.
    let at = 3 + shown.len() % (shown.len() - 3);
    let other = if shown.as_bytes()[at] == b'q' { "p" } else { "q" };
    let mut bent = shown.to_string();
    bent.replace_range(at..=at, other);
    assert_eq!(bent.parse::<Invite>().err(), Some(InviteError::Damaged));
    // The tags are judged where they are used.
    let _ = invite.attributes();
}

/// The input is a text, and the contents of a code.
pub(crate) fn run(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        address(text);
        code(text);
    }
    code(&line(input));
}

/// Codes, what is in them, and addresses.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let pinned = format!("wss://hub.example:7420#sha256={}", "5c".repeat(32));
    let invite = World::new().invite("http://127.0.0.1:7420");
    let share = Invite {
        hub: pinned.parse().expect("an address"),
        tags: vec!["eu".to_owned(), "db".to_owned()],
        share: Some(ShareGrant {
            secret: ShareSecret::from_bytes(secret("share")),
            label: "for Ann".parse().expect("a label"),
        }),
        ..World::new().invite("http://127.0.0.1:7420")
    };
    let body = |invite: &Invite| {
        let line = invite.reveal();
        let checked = CheckedHrpstring::new::<Bech32m>(&line).expect("a code");
        checked.byte_iter().collect::<Vec<u8>>()
    };
    vec![
        ("address", pinned.into_bytes()),
        ("invite", invite.reveal().as_bytes().to_vec()),
        ("invite_contents", body(&invite)),
        ("share", share.reveal().as_bytes().to_vec()),
        ("share_contents", body(&share)),
    ]
}
