use connect_crypto::invite::{HubAddress, HubAddressError, Invite, InviteError};
use connect_spec::log::{EntryHash, Head};
use proptest::prelude::*;

use crate::common::{World, bytes};

const PLAIN: &str = "https://hub.example.com:7420";

fn pinned() -> String {
    format!("{PLAIN}#sha256={}", "5a".repeat(32))
}

#[track_caller]
fn refused(text: &str, expected: InviteError) {
    assert_eq!(text.parse::<Invite>().err(), Some(expected));
}

#[test]
fn invites_come_back() {
    let world = World::new();
    for hub in [PLAIN.to_owned(), pinned()] {
        for head in [world.head(), Head { seq: 70_000, hash: EntryHash(bytes("head")) }] {
            let invite = Invite { head, ..world.invite(&hub) };
            let read: Invite = invite.reveal().parse().unwrap();
            assert_eq!(read.hub, invite.hub);
            assert_eq!(read.workspace_id, world.workspace);
            assert_eq!(read.head, head);
            assert_eq!(read.seed.as_bytes(), invite.seed.as_bytes());
        }
    }
}

#[test]
fn an_invite_is_one_short_line() {
    let line = World::new().invite(PLAIN).reveal();
    assert!(line.starts_with("pc1"));
    assert!(line.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
    assert_eq!(line.len(), 235);
    assert_eq!(World::new().invite(&pinned()).reveal().len(), 291);
}

#[test]
fn pasted_white_space_does_no_harm() {
    let line = World::new().invite(PLAIN).reveal();
    assert!(format!("  {}\r\n", *line).parse::<Invite>().is_ok());
    let broken = format!("{} {}", &line[..100], &line[100..]);
    refused(&broken, InviteError::Damaged);
}

#[test]
fn one_changed_character_anywhere_is_refused() {
    let line = World::new().invite(&pinned()).reveal();
    for position in 0..line.len() {
        for other in "qpzry9x8gf2tvdw0s3jn54khce6mua7l1bioQ -\u{e9}".chars() {
            if line[position..].starts_with(other) {
                continue;
            }
            let mut changed = line[..position].to_owned();
            changed.push(other);
            changed.push_str(&line[position + 1..]);
            // A space at the end is trimmed, and then a character is missing: refused as well.
            let refusal = changed.parse::<Invite>().err();
            let expected =
                if position < 3 { InviteError::NotAnInvite } else { InviteError::Damaged };
            assert_eq!(refusal, Some(expected), "{other:?} at {position}");
        }
    }
}

#[test]
fn lost_doubled_and_swapped_characters_are_refused() {
    let line = World::new().invite(PLAIN).reveal();
    for position in 3..line.len() {
        refused(&[&line[..position], &line[position + 1..]].concat(), InviteError::Damaged);
        refused(&[&line[..position], &line[position - 1..]].concat(), InviteError::Damaged);
        let mut swapped = line.as_bytes().to_vec();
        if position > 3 && swapped[position] != swapped[position - 1] {
            swapped.swap(position, position - 1);
            refused(str::from_utf8(&swapped).unwrap(), InviteError::Damaged);
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let line = World::new().invite(PLAIN).reveal();
    for length in 0..line.len() {
        let expected = if length < 3 { InviteError::NotAnInvite } else { InviteError::Damaged };
        refused(&line[..length], expected);
    }
}

#[test]
fn what_is_no_invite_is_told_apart() {
    refused("", InviteError::NotAnInvite);
    refused("hello", InviteError::NotAnInvite);
    refused("https://hub.example", InviteError::NotAnInvite);
    refused("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", InviteError::NotAnInvite);
    refused("é", InviteError::NotAnInvite);
    refused("pcé1", InviteError::NotAnInvite);
    refused("pc1", InviteError::Damaged);
    refused(&format!("pc1{}", "q".repeat(1020)), InviteError::Damaged);
    refused(&format!("pc1{}", "q".repeat(1021)), InviteError::TooLong);
}

#[track_caller]
fn hub(text: &str, expected: Result<(), HubAddressError>) {
    let parsed = text.parse::<HubAddress>();
    assert_eq!(parsed.as_ref().map(|_| ()).map_err(|error| *error), expected, "{text}");
    if let Ok(address) = parsed {
        assert_eq!(address.to_string(), text);
    }
}

#[test]
fn hub_addresses_have_one_spelling() {
    let digits = "0f".repeat(32);
    for url in ["http://127.0.0.1:7420", "https://[::1]:7420", "ws://h", "wss://hub.example/x"] {
        hub(url, Ok(()));
        hub(&format!("{url}#sha256={digits}"), Ok(()));
    }
    for url in [
        "",
        "hub.example",
        "HTTPS://hub.example",
        "ftp://hub.example",
        "https://",
        "https:///x",
        "https:hub",
    ] {
        hub(url, Err(HubAddressError::Scheme));
    }
    for url in ["https://hub example", "https://hub\n", "https://h\u{fc}b"] {
        hub(url, Err(HubAddressError::Character));
    }
    let longest = format!("https://{}", "h".repeat(247));
    hub(&longest, Ok(()));
    hub(&format!("{longest}#sha256={digits}"), Ok(()));
    hub(&format!("{longest}h"), Err(HubAddressError::TooLong));
    for fragment in [
        String::new(),
        "sha256=".to_owned(),
        digits.clone(),
        format!("sha256={}", digits.to_uppercase()),
        format!("sha256={}", &digits[1..]),
        format!("sha256={digits}0"),
        format!("sha256={digits}#"),
        format!("SHA256={digits}"),
        format!("sha1={digits}"),
    ] {
        hub(&format!("https://h#{fragment}"), Err(HubAddressError::Pin));
    }
}

proptest! {
    #[test]
    fn reading_never_panics(text in ".{0,80}", tail in "[a-z0-9]{0,300}") {
        let _ = text.parse::<Invite>();
        let _ = text.parse::<HubAddress>();
        let _ = format!("pc1{tail}").parse::<Invite>();
        let _ = format!("https://{text}").parse::<HubAddress>();
    }
}
