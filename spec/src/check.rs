//! What an exposer says of its target when a reacher asks: the answer on a check stream.
//! PROTOCOL.md, "Checks".
//!
//! One canonical map, written once and read by whoever holds the stream. It names neither the target nor
//! an address: the reacher learns how the target is, not where.

use crate::{
    cbor::{CborError, Fields, FieldsWriter},
    limits::{MAX_CHECK_NAMES, MAX_CHECK_REPORT_BYTES, MAX_CHECK_TEXT_BYTES, MAX_PROTOCOL_BYTES},
    objects::UnixTime,
};

/// The version of the report.
const REPORT_VERSION: u64 = 1;

mod key {
    pub(super) const VERSION: u64 = 0;
    pub(super) const OUTCOME: u64 = 1;
    pub(super) const ADDRESSES: u64 = 2;
    pub(super) const RESOLVED_MICROS: u64 = 3;
    pub(super) const CONNECTED_MICROS: u64 = 4;
    pub(super) const PROTOCOL: u64 = 5;
    pub(super) const DETAIL: u64 = 6;
    pub(super) const WARNING: u64 = 7;
    pub(super) const TLS: u64 = 8;

    pub(super) const TLS_VERSION: u64 = 1;
    pub(super) const TLS_NAMES: u64 = 2;
    pub(super) const TLS_NOT_BEFORE: u64 = 3;
    pub(super) const TLS_NOT_AFTER: u64 = 4;
    pub(super) const TLS_NAME_MATCHES: u64 = 5;
    pub(super) const TLS_TRUSTED: u64 = 6;
}

/// How a target answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// Whether a connection came about.
    pub outcome: Outcome,
    /// How its name resolved; `None` for a target that is an address.
    pub resolved: Option<Resolved>,
    /// How long the TCP connection took, in microseconds.
    pub connected_micros: Option<u64>,
    /// What is spoken there: `postgres`, `http`, …, or `tcp` when that is not known.
    pub protocol: Protocol,
    /// What the target said, in words of the exposer.
    pub detail: Option<Printable>,
    /// What is odd about it, though it answers.
    pub warning: Option<Printable>,
    /// Its TLS, if it speaks that.
    pub tls: Option<TlsReport>,
}

/// Whether a connection to the target came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Connected,
    /// The target's name does not resolve.
    NameUnknown,
    /// The connection was refused.
    Refused,
    /// Nothing answered in time.
    TimedOut,
    /// There is no way there.
    Unreachable,
}

/// How the name of a target resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolved {
    /// To how many addresses.
    pub addresses: u32,
    /// In how many microseconds.
    pub micros: u64,
}

/// What a target shows in a TLS handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsReport {
    /// `TLS 1.3`.
    pub version: Printable,
    /// Names in its certificate, at most [`MAX_CHECK_NAMES`].
    pub names: Vec<Printable>,
    /// When the certificate begins to be valid; `None` when it cannot be read.
    pub not_before: Option<UnixTime>,
    /// When it ends to be valid; `None` when it cannot be read.
    pub not_after: Option<UnixTime>,
    /// Whether it is for the name by which the exposer dials.
    pub name_matches: Option<bool>,
    /// Whether an authority signed it that the exposer's system trusts; its name and time do not count here.
    pub trusted: Option<bool>,
}

/// Text of another party that can be printed: no control characters, and nothing that changes the
/// direction of what stands beside it. Not empty, at most [`MAX_CHECK_TEXT_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Printable(String);

impl Printable {
    /// What of `text` can be printed, cut where it is too long; `None` when nothing is left.
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        let mut kept = String::new();
        for character in text.chars().filter(|character| is_printable(*character)) {
            if kept.len() + character.len_utf8() > MAX_CHECK_TEXT_BYTES {
                break;
            }
            kept.push(character);
        }
        (!kept.is_empty()).then_some(Self(kept))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Printable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a character stands for itself on a terminal.
fn is_printable(character: char) -> bool {
    // Zero-width and bidirectional marks, line separators, and the byte order mark.
    let invisible = matches!(
        character,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}'
    );
    !character.is_control() && !invisible
}

/// The name of a protocol: lower-case letters, digits and `-`, at most [`MAX_PROTOCOL_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocol(String);

impl Protocol {
    /// The protocol of this name, if it is one.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let fits = (1..=MAX_PROTOCOL_BYTES).contains(&name.len());
        (fits && name.bytes().all(plain)).then(|| Self(name.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Outcome {
    fn number(self) -> u64 {
        match self {
            Self::Connected => 0,
            Self::NameUnknown => 1,
            Self::Refused => 2,
            Self::TimedOut => 3,
            Self::Unreachable => 4,
        }
    }

    fn from_number(number: u64) -> Option<Self> {
        let all =
            [Self::Connected, Self::NameUnknown, Self::Refused, Self::TimedOut, Self::Unreachable];
        all.into_iter().find(|outcome| outcome.number() == number)
    }
}

/// A report that breaks the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Longer than [`MAX_CHECK_REPORT_BYTES`].
    #[error("too long")]
    Length,
    /// Not one canonical map with the fields of a report.
    #[error(transparent)]
    Cbor(#[from] CborError),
    /// A version that this program does not know.
    #[error("version {0} is not known")]
    Version(u64),
    /// A value that its field does not allow.
    #[error("field {0} holds a value that is not allowed")]
    Value(u64),
}

impl CheckReport {
    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(key::VERSION, REPORT_VERSION)
            .uint(key::OUTCOME, self.outcome.number())
            .optional(self.resolved, |writer, resolved| {
                writer
                    .uint(key::ADDRESSES, resolved.addresses)
                    .uint(key::RESOLVED_MICROS, resolved.micros)
            })
            .optional(self.connected_micros, |writer, micros| {
                writer.uint(key::CONNECTED_MICROS, micros)
            })
            .text(key::PROTOCOL, self.protocol.as_str())
            .optional(self.detail.as_ref(), |writer, text| writer.text(key::DETAIL, text.as_str()))
            .optional(self.warning.as_ref(), |writer, text| {
                writer.text(key::WARNING, text.as_str())
            })
            .optional(self.tls.as_ref(), |writer, tls| writer.map(key::TLS, tls.write()))
            .finish()
    }

    /// Reads what [`CheckReport::encode`] wrote, of a peer that may write anything.
    ///
    /// # Errors
    /// [`ReportError`]; what it says of texts holds for every one that is read.
    pub fn decode(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() > MAX_CHECK_REPORT_BYTES {
            return Err(ReportError::Length);
        }
        let mut fields = Fields::decode(bytes)?;
        let version = fields.uint(key::VERSION)?;
        if version != REPORT_VERSION {
            return Err(ReportError::Version(version));
        }
        let outcome = Outcome::from_number(fields.uint(key::OUTCOME)?)
            .ok_or(ReportError::Value(key::OUTCOME))?;
        let addresses = fields.optional_uint(key::ADDRESSES)?;
        let resolved = match (addresses, fields.optional_uint(key::RESOLVED_MICROS)?) {
            (Some(addresses), Some(micros)) => Some(Resolved {
                addresses: addresses.try_into().map_err(|_| ReportError::Value(key::ADDRESSES))?,
                micros,
            }),
            (None, None) => None,
            _ => return Err(ReportError::Value(key::RESOLVED_MICROS)),
        };
        let connected_micros = fields.optional_uint(key::CONNECTED_MICROS)?;
        // A time of a connection that did not come about, or none of one that did.
        if connected_micros.is_some() != (outcome == Outcome::Connected) {
            return Err(ReportError::Value(key::CONNECTED_MICROS));
        }
        let protocol =
            Protocol::new(fields.text(key::PROTOCOL)?).ok_or(ReportError::Value(key::PROTOCOL))?;
        let detail = optional_printable(&mut fields, key::DETAIL)?;
        let warning = optional_printable(&mut fields, key::WARNING)?;
        let tls = fields.optional_map(key::TLS)?.map(TlsReport::read).transpose()?;
        fields.finish()?;
        Ok(Self { outcome, resolved, connected_micros, protocol, detail, warning, tls })
    }
}

impl TlsReport {
    fn write(&self) -> FieldsWriter {
        FieldsWriter::new()
            .text(key::TLS_VERSION, self.version.as_str())
            .texts(key::TLS_NAMES, self.names.iter().map(Printable::as_str))
            .optional(self.not_before, |writer, time| writer.uint(key::TLS_NOT_BEFORE, time))
            .optional(self.not_after, |writer, time| writer.uint(key::TLS_NOT_AFTER, time))
            .optional(self.name_matches, |writer, is_so| writer.bool(key::TLS_NAME_MATCHES, is_so))
            .optional(self.trusted, |writer, is_so| writer.bool(key::TLS_TRUSTED, is_so))
    }

    fn read(mut fields: Fields<'_>) -> Result<Self, ReportError> {
        let version = printable(fields.text(key::TLS_VERSION)?, key::TLS_VERSION)?;
        let names = fields
            .optional_texts(key::TLS_NAMES, MAX_CHECK_NAMES)?
            .ok_or(CborError::Missing(key::TLS_NAMES))?
            .into_iter()
            .map(|name| printable(name, key::TLS_NAMES))
            .collect::<Result<_, _>>()?;
        let tls = Self {
            version,
            names,
            not_before: fields.optional_uint(key::TLS_NOT_BEFORE)?,
            not_after: fields.optional_uint(key::TLS_NOT_AFTER)?,
            name_matches: fields.optional_bool(key::TLS_NAME_MATCHES)?,
            trusted: fields.optional_bool(key::TLS_TRUSTED)?,
        };
        fields.finish()?;
        Ok(tls)
    }
}

fn optional_printable(fields: &mut Fields<'_>, key: u64) -> Result<Option<Printable>, ReportError> {
    fields.optional_text(key)?.map(|text| printable(text, key)).transpose()
}

/// A text that is printable as it is: whoever writes a report leaves the rest out.
fn printable(text: &str, key: u64) -> Result<Printable, ReportError> {
    Printable::of(text)
        .filter(|printable| printable.as_str() == text)
        .ok_or(ReportError::Value(key))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(text: &str) -> Printable {
        Printable::of(text).expect("printable")
    }

    fn full() -> CheckReport {
        CheckReport {
            outcome: Outcome::Connected,
            resolved: Some(Resolved { addresses: 2, micros: 3100 }),
            connected_micros: Some(400),
            protocol: Protocol::new("postgres").expect("a name"),
            detail: Some(text("asks for a password")),
            warning: Some(text("odd")),
            tls: Some(TlsReport {
                version: text("TLS 1.3"),
                names: vec![text("db.internal")],
                not_before: Some(1),
                not_after: Some(2),
                name_matches: Some(false),
                trusted: Some(true),
            }),
        }
    }

    #[test]
    fn a_report_has_these_bytes() {
        let check = |report: &CheckReport, expected: &str| {
            assert_eq!(hex::encode(report.encode()), expected.replace(' ', ""));
            assert_eq!(CheckReport::decode(&report.encode()).as_ref(), Ok(report));
        };
        let refused = CheckReport {
            outcome: Outcome::Refused,
            resolved: None,
            connected_micros: None,
            protocol: Protocol::new("tcp").expect("a name"),
            detail: None,
            warning: None,
            tls: None,
        };
        check(&refused, "a3 00 01 01 02 05 63 746370");
        check(
            &full(),
            "a9 00 01 01 00 02 02 03 190c1c 04 190190 05 68 706f737467726573 \
             06 73 61736b7320666f7220612070617373776f7264 07 63 6f6464 \
             08 a6 01 67 544c5320312e33 02 81 6b 64622e696e7465726e616c 03 01 04 02 05 f4 06 f5",
        );
    }

    #[test]
    fn what_is_not_a_report_is_refused() {
        let check = |bytes: &str, expected: ReportError| {
            let bytes = hex::decode(bytes.replace(' ', "")).expect("hex");
            assert_eq!(CheckReport::decode(&bytes), Err(expected));
        };
        check("", CborError::Truncated.into());
        check("a3 00 02 01 02 05 63 746370", ReportError::Version(2));
        check("a3 00 01 01 05 05 63 746370", ReportError::Value(1));
        check("a2 00 01 01 02", CborError::Missing(5).into());
        check("a4 00 01 01 02 05 63 746370 09 00", CborError::UnknownCritical(9).into());
        // A time without a connection, and none with one; half a resolution.
        check("a4 00 01 01 02 04 01 05 63 746370", ReportError::Value(4));
        check("a3 00 01 01 00 05 63 746370", ReportError::Value(4));
        check("a4 00 01 01 02 02 01 05 63 746370", ReportError::Value(3));
        // Protocols: empty, upper case, too long.
        check("a3 00 01 01 02 05 60", ReportError::Value(5));
        check("a3 00 01 01 02 05 63 544350", ReportError::Value(5));
        check(&format!("a3 00 01 01 02 05 78 19 {}", "61".repeat(25)), ReportError::Value(5));
        // Texts: empty, an escape, a mark that turns what follows.
        check("a4 00 01 01 02 05 63 746370 06 60", ReportError::Value(6));
        check("a4 00 01 01 02 05 63 746370 06 62 1b63", ReportError::Value(6));
        check("a4 00 01 01 02 05 63 746370 06 63 e280ae", ReportError::Value(6));
        let mut long = full();
        long.detail = Some(Printable("x".repeat(MAX_CHECK_TEXT_BYTES + 1)));
        assert_eq!(CheckReport::decode(&long.encode()), Err(ReportError::Value(6)));
        long.detail = Some(Printable("x".repeat(MAX_CHECK_TEXT_BYTES)));
        assert!(CheckReport::decode(&long.encode()).is_ok());
        assert_eq!(CheckReport::decode(&[0; MAX_CHECK_REPORT_BYTES + 1]), Err(ReportError::Length));
    }

    #[test]
    fn the_longest_report_fits_its_limit() {
        let mut report = full();
        let longest = text(&"ü".repeat(MAX_CHECK_TEXT_BYTES / 2));
        (report.detail, report.warning) = (Some(longest.clone()), Some(longest.clone()));
        let name = text(&"n".repeat(MAX_CHECK_TEXT_BYTES));
        let tls = report.tls.as_mut().expect("it has one");
        (tls.version, tls.names) = (longest, vec![name; MAX_CHECK_NAMES]);
        assert!(CheckReport::decode(&report.encode()).is_ok());
        let tls = report.tls.as_mut().expect("it has one");
        tls.names.push(text("n"));
        assert!(CheckReport::decode(&report.encode()).is_err(), "a name too many");
    }

    #[test]
    fn printable_texts_keep_what_stands_for_itself() {
        let check = |input: &str, expected: Option<&str>| {
            assert_eq!(Printable::of(input).as_ref().map(Printable::as_str), expected);
        };
        check("plain — ünïcode 漢字", Some("plain — ünïcode 漢字"));
        check("a\u{1b}[2Jb\r\nc\u{202e}d\u{9b}e", Some("a[2Jbcde"));
        check("\u{0}\u{7f}\u{200b}", None);
        check("", None);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(report) = CheckReport::decode(&bytes) {
                prop_assert_eq!(CheckReport::decode(&report.encode()), Ok(report));
            }
        }
    }
}
