//! Canonical CBOR (RFC 8949) as signed bodies use it: one spelling for each value.
//!
//! [`check`] is the byte walker that admits a body; [`Fields`] then reads it, [`FieldsWriter`]
//! writes one. PROTOCOL.md, "Signed objects". minicbor alone accepts non-canonical input, hence
//! the walker.

use std::collections::BTreeMap;

use minicbor::{Decoder, Encoder};

use crate::limits::MAX_CBOR_DEPTH;

/// Why bytes are not a canonical body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CborError {
    /// The input ends inside an item.
    #[error("truncated")]
    Truncated,
    /// Bytes follow the item.
    #[error("trailing bytes")]
    Trailing,
    /// An integer or a length that has a shorter form.
    #[error("not the shortest form")]
    NotShortest,
    /// Indefinite length, tag, float, null, negative integer or another unused kind of item.
    #[error("item of a kind that signed objects do not use")]
    Kind,
    /// Text that is not UTF-8.
    #[error("text is not UTF-8")]
    Utf8,
    /// Map keys that are not unsigned and strictly ascending (a repeated key included).
    #[error("map keys are not unsigned and strictly ascending")]
    Keys,
    /// Deeper than [`MAX_CBOR_DEPTH`].
    #[error("nested too deeply")]
    Depth,
    /// The body is not a map, or a field has another type than its key says.
    #[error("field {0} has the wrong type or length")]
    Type(u64),
    /// A field that must be there is not.
    #[error("field {0} is missing")]
    Missing(u64),
    /// A critical field (key below 64) that this version does not know.
    #[error("field {0} is critical and unknown")]
    UnknownCritical(u64),
}

const MAJOR_UINT: u8 = 0;
const MAJOR_BYTES: u8 = 2;
const MAJOR_TEXT: u8 = 3;
const MAJOR_ARRAY: u8 = 4;
const MAJOR_MAP: u8 = 5;
const FALSE: u8 = 0xf4;
const TRUE: u8 = 0xf5;

/// Walks `input` and returns whether it is exactly one canonical item.
///
/// # Errors
/// The first deviation from the canonical form, see [`CborError`].
pub fn check(input: &[u8]) -> Result<(), CborError> {
    let mut walker = Walker { rest: input };
    walker.item(0)?;
    if walker.rest.is_empty() { Ok(()) } else { Err(CborError::Trailing) }
}

/// The byte walker: everything it passes is canonical.
struct Walker<'b> {
    rest: &'b [u8],
}

impl<'b> Walker<'b> {
    fn take(&mut self, count: u64) -> Result<&'b [u8], CborError> {
        let count = usize::try_from(count).map_err(|_| CborError::Truncated)?;
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(CborError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads an initial byte and its argument in the shortest form (RFC 8949 section 3).
    fn head(&mut self) -> Result<(u8, u64), CborError> {
        let (&first, rest) = self.rest.split_first().ok_or(CborError::Truncated)?;
        self.rest = rest;
        if first == FALSE || first == TRUE {
            return Ok((7, u64::from(first == TRUE)));
        }
        let major = first >> 5;
        if major == 7 {
            return Err(CborError::Kind);
        }
        let (width, least) = match first & 0x1f {
            small @ 0..=23 => return Ok((major, u64::from(small))),
            24 => (1, 24),
            25 => (2, 1 << 8),
            26 => (4, 1 << 16),
            27 => (8, 1 << 32),
            _ => return Err(CborError::Kind),
        };
        let argument =
            self.take(width)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        if argument < least {
            return Err(CborError::NotShortest);
        }
        Ok((major, argument))
    }

    fn item(&mut self, depth: usize) -> Result<(), CborError> {
        match self.head()? {
            (MAJOR_UINT | 7, _) => Ok(()),
            (MAJOR_BYTES, length) => self.take(length).map(|_| ()),
            (MAJOR_TEXT, length) => {
                std::str::from_utf8(self.take(length)?).map(|_| ()).map_err(|_| CborError::Utf8)
            }
            (MAJOR_ARRAY, length) => {
                let depth = deeper(depth)?;
                (0..length).try_for_each(|_| self.item(depth))
            }
            (MAJOR_MAP, length) => {
                let depth = deeper(depth)?;
                let mut last = None;
                for _ in 0..length {
                    let (major, key) = self.head()?;
                    if major != MAJOR_UINT || last.is_some_and(|last| key <= last) {
                        return Err(CborError::Keys);
                    }
                    last = Some(key);
                    self.item(depth)?;
                }
                Ok(())
            }
            _ => Err(CborError::Kind),
        }
    }
}

fn deeper(depth: usize) -> Result<usize, CborError> {
    if depth == MAX_CBOR_DEPTH { Err(CborError::Depth) } else { Ok(depth + 1) }
}

/// First key of the optional fields: unknown ones from here on are ignored, and still hashed.
const FIRST_OPTIONAL_KEY: u64 = 64;

/// The fields of one canonical map, read by key.
///
/// Every accessor takes its field out; [`Fields::finish`] refuses what is left and critical.
#[derive(Debug)]
pub struct Fields<'b>(BTreeMap<u64, &'b [u8]>);

impl<'b> Fields<'b> {
    /// Checks that `input` is one canonical map and splits it into fields.
    ///
    /// # Errors
    /// As [`check`]; [`CborError::Type`] when the item is no map.
    pub fn decode(input: &'b [u8]) -> Result<Self, CborError> {
        check(input)?;
        Self::split(input)
    }

    /// Splits a map that [`check`] has passed as a part of its surroundings.
    fn split(input: &'b [u8]) -> Result<Self, CborError> {
        let mut walker = Walker { rest: input };
        let (MAJOR_MAP, length) = walker.head()? else {
            return Err(CborError::Type(0));
        };
        let mut fields = BTreeMap::new();
        for _ in 0..length {
            let (_, key) = walker.head()?;
            let start = walker.rest;
            walker.item(0)?;
            fields.insert(key, &start[..start.len() - walker.rest.len()]);
        }
        Ok(Self(fields))
    }

    fn read<T>(
        &mut self,
        key: u64,
        read: impl FnOnce(&mut Decoder<'b>) -> Result<T, minicbor::decode::Error>,
    ) -> Result<Option<T>, CborError> {
        let Some(raw) = self.0.remove(&key) else {
            return Ok(None);
        };
        read(&mut Decoder::new(raw)).map(Some).map_err(|_| CborError::Type(key))
    }

    /// An unsigned integer, if present.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_uint(&mut self, key: u64) -> Result<Option<u64>, CborError> {
        self.read(key, Decoder::u64)
    }

    /// An unsigned integer that fits `T`.
    ///
    /// # Errors
    /// [`CborError::Missing`], [`CborError::Type`].
    pub fn uint<T: TryFrom<u64>>(&mut self, key: u64) -> Result<T, CborError> {
        let value = self.optional_uint(key)?.ok_or(CborError::Missing(key))?;
        T::try_from(value).map_err(|_| CborError::Type(key))
    }

    /// A boolean, if present.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_bool(&mut self, key: u64) -> Result<Option<bool>, CborError> {
        self.read(key, Decoder::bool)
    }

    /// A byte string, if present.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_bytes(&mut self, key: u64) -> Result<Option<&'b [u8]>, CborError> {
        self.read(key, Decoder::bytes)
    }

    /// A byte string.
    ///
    /// # Errors
    /// [`CborError::Missing`], [`CborError::Type`].
    pub fn bytes(&mut self, key: u64) -> Result<&'b [u8], CborError> {
        self.optional_bytes(key)?.ok_or(CborError::Missing(key))
    }

    /// A byte string of the length of `T`.
    ///
    /// # Errors
    /// [`CborError::Missing`], [`CborError::Type`].
    pub fn fixed<T: TryFrom<&'b [u8]>>(&mut self, key: u64) -> Result<T, CborError> {
        T::try_from(self.bytes(key)?).map_err(|_| CborError::Type(key))
    }

    /// A text, if present.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_text(&mut self, key: u64) -> Result<Option<&'b str>, CborError> {
        self.read(key, Decoder::str)
    }

    /// A text.
    ///
    /// # Errors
    /// [`CborError::Missing`], [`CborError::Type`].
    pub fn text(&mut self, key: u64) -> Result<&'b str, CborError> {
        self.optional_text(key)?.ok_or(CborError::Missing(key))
    }

    /// An array, if present: each item as its own canonical bytes, at most `max` of them.
    fn optional_array(&mut self, key: u64, max: usize) -> Result<Option<Vec<&'b [u8]>>, CborError> {
        let Some(raw) = self.0.remove(&key) else {
            return Ok(None);
        };
        let mut walker = Walker { rest: raw };
        let (MAJOR_ARRAY, length) = walker.head()? else {
            return Err(CborError::Type(key));
        };
        if length > max as u64 {
            return Err(CborError::Type(key));
        }
        let mut items = Vec::new();
        for _ in 0..length {
            let start = walker.rest;
            walker.item(0)?;
            items.push(&start[..start.len() - walker.rest.len()]);
        }
        Ok(Some(items))
    }

    /// An array of maps, at most `max` of them.
    ///
    /// # Errors
    /// [`CborError::Missing`], [`CborError::Type`].
    pub fn maps(&mut self, key: u64, max: usize) -> Result<Vec<Self>, CborError> {
        self.optional_array(key, max)?
            .ok_or(CborError::Missing(key))?
            .into_iter()
            .map(|item| Self::split(item).map_err(|_| CborError::Type(key)))
            .collect()
    }

    /// An array of byte strings of the length of `T`, if present, at most `max` of them.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_fixed_array<T: TryFrom<&'b [u8]>>(
        &mut self,
        key: u64,
        max: usize,
    ) -> Result<Option<Vec<T>>, CborError> {
        let Some(items) = self.optional_array(key, max)? else {
            return Ok(None);
        };
        items
            .into_iter()
            .map(|item| Decoder::new(item).bytes().ok().and_then(|raw| T::try_from(raw).ok()))
            .collect::<Option<_>>()
            .ok_or(CborError::Type(key))
            .map(Some)
    }

    /// An array of texts, if present, at most `max` of them.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_texts(
        &mut self,
        key: u64,
        max: usize,
    ) -> Result<Option<Vec<&'b str>>, CborError> {
        let Some(items) = self.optional_array(key, max)? else {
            return Ok(None);
        };
        let text = |item| Decoder::new(item).str().map_err(|_| CborError::Type(key));
        items.into_iter().map(text).collect::<Result<_, _>>().map(Some)
    }

    /// A nested map, if present.
    ///
    /// # Errors
    /// [`CborError::Type`].
    pub fn optional_map(&mut self, key: u64) -> Result<Option<Self>, CborError> {
        self.0
            .remove(&key)
            .map(|raw| Self::split(raw).map_err(|_| CborError::Type(key)))
            .transpose()
    }

    /// Ends the reading: every critical field must have been taken.
    ///
    /// # Errors
    /// [`CborError::UnknownCritical`].
    pub fn finish(self) -> Result<(), CborError> {
        match self.0.first_key_value() {
            Some((key, _)) if *key < FIRST_OPTIONAL_KEY => Err(CborError::UnknownCritical(*key)),
            _ => Ok(()),
        }
    }
}

/// Writes one canonical map. Keys must be given in ascending order.
#[derive(Debug, Clone, Default)]
pub struct FieldsWriter {
    count: u64,
    last_key: Option<u64>,
    items: Vec<u8>,
}

impl FieldsWriter {
    /// Begins an empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn key(&mut self, key: u64) -> Encoder<&mut Vec<u8>> {
        debug_assert!(self.last_key.is_none_or(|last| last < key), "keys ascend");
        self.last_key = Some(key);
        self.count += 1;
        let mut encoder = Encoder::new(&mut self.items);
        infallible(encoder.u64(key).map(|_| ()));
        encoder
    }

    /// Appends an unsigned integer.
    pub fn uint(mut self, key: u64, value: impl Into<u64>) -> Self {
        infallible(self.key(key).u64(value.into()).map(|_| ()));
        self
    }

    /// Appends a boolean.
    pub fn bool(mut self, key: u64, value: bool) -> Self {
        infallible(self.key(key).bool(value).map(|_| ()));
        self
    }

    /// Appends a byte string.
    pub fn bytes(mut self, key: u64, value: &[u8]) -> Self {
        infallible(self.key(key).bytes(value).map(|_| ()));
        self
    }

    /// Appends a text.
    pub fn text(mut self, key: u64, value: &str) -> Self {
        infallible(self.key(key).str(value).map(|_| ()));
        self
    }

    /// Appends an array of byte strings.
    pub fn byte_strings<'i>(
        mut self,
        key: u64,
        items: impl ExactSizeIterator<Item = &'i [u8]>,
    ) -> Self {
        let mut encoder = self.key(key);
        infallible(encoder.array(items.len() as u64).map(|_| ()));
        for item in items {
            infallible(encoder.bytes(item).map(|_| ()));
        }
        self
    }

    /// Appends an array of texts.
    pub fn texts<'i>(mut self, key: u64, items: impl ExactSizeIterator<Item = &'i str>) -> Self {
        let mut encoder = self.key(key);
        infallible(encoder.array(items.len() as u64).map(|_| ()));
        for item in items {
            infallible(encoder.str(item).map(|_| ()));
        }
        self
    }

    /// Appends a nested map.
    pub fn map(mut self, key: u64, value: Self) -> Self {
        self.key(key);
        self.items.extend(value.finish());
        self
    }

    /// Appends an array of maps.
    pub fn maps(mut self, key: u64, values: impl ExactSizeIterator<Item = Self>) -> Self {
        infallible(self.key(key).array(values.len() as u64).map(|_| ()));
        for value in values {
            self.items.extend(value.finish());
        }
        self
    }

    /// Appends what `write` appends when `value` is there, nothing otherwise.
    pub fn optional<T>(self, value: Option<T>, write: impl FnOnce(Self, T) -> Self) -> Self {
        match value {
            Some(value) => write(self, value),
            None => self,
        }
    }

    /// The canonical bytes of the map.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut map = Vec::with_capacity(self.items.len() + 2);
        infallible(Encoder::new(&mut map).map(self.count).map(|_| ()));
        map.extend(self.items);
        map
    }
}

/// Writing into a `Vec` cannot fail.
pub(crate) fn infallible(result: Result<(), minicbor::encode::Error<std::convert::Infallible>>) {
    result.expect("writing CBOR into a Vec cannot fail");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn refused(hex_input: &str, expected: CborError) {
        let input = hex::decode(hex_input).expect("hex");
        assert_eq!(check(&input), Err(expected), "{hex_input}");
    }

    #[track_caller]
    fn accepted(hex_input: &str) {
        assert_eq!(check(&hex::decode(hex_input).expect("hex")), Ok(()), "{hex_input}");
    }

    #[test]
    fn canonical_items_pass() {
        for input in
            ["00", "17", "1818", "190100", "1a00010000", "1b0000000100000000", "40", "4100", "60"]
        {
            accepted(input);
        }
        for input in ["80", "820001", "a0", "a1000a", "a200f401f5", "a10081a0"] {
            accepted(input);
        }
    }

    #[test]
    fn every_other_spelling_is_refused() {
        refused("", CborError::Truncated);
        refused("18", CborError::Truncated);
        refused("4100ff", CborError::Trailing);
        refused("42ff", CborError::Truncated);
        refused("1817", CborError::NotShortest);
        refused("1900ff", CborError::NotShortest);
        refused("1a0000ffff", CborError::NotShortest);
        refused("1b00000000ffffffff", CborError::NotShortest);
        refused("5801ff", CborError::NotShortest);
        refused("20", CborError::Kind);
        refused("5f41ffff", CborError::Kind);
        refused("9fff", CborError::Kind);
        refused("bfff", CborError::Kind);
        refused("c000", CborError::Kind);
        refused("f6", CborError::Kind);
        refused("f7", CborError::Kind);
        refused("f93c00", CborError::Kind);
        refused("fb3ff0000000000000", CborError::Kind);
        refused("f814", CborError::Kind);
        refused("61ff", CborError::Utf8);
        refused("a2010000f4", CborError::Keys);
        refused("a200000000", CborError::Keys);
        refused("a1614100", CborError::Keys);
        refused("a12000", CborError::Keys);
        refused("9bffffffffffffffff", CborError::Truncated);
    }

    #[test]
    fn depth_is_bounded_at_the_limit() {
        let nested = |depth: usize| [vec![0x81; depth], vec![0x00]].concat();
        assert_eq!(check(&nested(MAX_CBOR_DEPTH)), Ok(()));
        assert_eq!(check(&nested(MAX_CBOR_DEPTH + 1)), Err(CborError::Depth));
    }

    #[test]
    fn unknown_fields_are_refused_below_64_and_ignored_from_there() {
        let optional = FieldsWriter::new().uint(0, 1u8).uint(64, 5u8).finish();
        let mut fields = Fields::decode(&optional).expect("canonical");
        assert_eq!(fields.uint::<u8>(0), Ok(1));
        assert_eq!(fields.finish(), Ok(()));

        let critical = FieldsWriter::new().uint(0, 1u8).uint(63, 5u8).finish();
        let mut fields = Fields::decode(&critical).expect("canonical");
        assert_eq!(fields.uint::<u8>(0), Ok(1));
        assert_eq!(fields.finish(), Err(CborError::UnknownCritical(63)));
    }

    #[test]
    fn fields_have_one_type() {
        let body = FieldsWriter::new().uint(0, 256u16).bytes(1, &[1, 2, 3]).text(2, "t").finish();
        let fields = || Fields::decode(&body).expect("canonical");
        assert_eq!(fields().uint::<u8>(0), Err(CborError::Type(0)));
        assert_eq!(fields().uint::<u8>(1), Err(CborError::Type(1)));
        assert_eq!(fields().fixed::<[u8; 4]>(1), Err(CborError::Type(1)));
        assert_eq!(fields().bytes(2), Err(CborError::Type(2)));
        assert_eq!(fields().bytes(9), Err(CborError::Missing(9)));
        assert!(Fields::decode(&[0x80]).is_err());
    }

    proptest! {
        #[test]
        fn walker_never_panics(input in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = check(&input);
            let _ = Fields::decode(&input);
        }

        /// What the walker admits, minicbor writes again byte for byte: the form is unique.
        #[test]
        fn written_maps_are_canonical(number in any::<u64>(), raw in proptest::collection::vec(any::<u8>(), 0..300), text in ".{0,80}", flag in any::<bool>()) {
            let body = FieldsWriter::new().uint(0, number).bytes(3, &raw).text(24, &text).bool(256, flag).finish();
            prop_assert_eq!(check(&body), Ok(()));
            let mut fields = Fields::decode(&body).expect("canonical");
            prop_assert_eq!(fields.uint::<u64>(0), Ok(number));
            prop_assert_eq!(fields.bytes(3), Ok(raw.as_slice()));
            prop_assert_eq!(fields.text(24), Ok(text.as_str()));
            prop_assert_eq!(fields.optional_bool(256), Ok(Some(flag)));
        }
    }
}
