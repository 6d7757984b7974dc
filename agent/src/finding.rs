//! What a look at something found: one line of `connect reach --check` and of `connect doctor`.

use serde::{Deserialize, Serialize};

use crate::error::ErrorKind;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingState {
    /// As it should be.
    Ok,
    /// It works, and somebody should look at it.
    Warn,
    /// It does not work.
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, for programs: `dns`, `tls`, `clock`, …
    pub what: String,
    /// How it is.
    pub state: FindingState,
    /// What was looked at, for people.
    pub title: String,
    /// What was seen.
    pub text: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The kind of the failure, which is also an exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorKind>,
}

impl Finding {
    /// Something that is as it should be.
    pub(crate) fn ok(what: &str, title: &str, text: impl std::fmt::Display) -> Self {
        Self {
            what: what.to_owned(),
            state: FindingState::Ok,
            title: title.to_owned(),
            text: text.to_string(),
            hint: None,
            code: None,
        }
    }

    /// Something that works and needs a look.
    pub(crate) fn warn(what: &str, title: &str, text: impl std::fmt::Display) -> Self {
        Self { state: FindingState::Warn, ..Self::ok(what, title, text) }
    }

    /// Something that does not work.
    pub(crate) fn fail(
        what: &str,
        title: &str,
        code: ErrorKind,
        text: impl std::fmt::Display,
    ) -> Self {
        Self { state: FindingState::Fail, code: Some(code), ..Self::ok(what, title, text) }
    }

    /// Adds what to do about it.
    pub(crate) fn hint(self, hint: impl std::fmt::Display) -> Self {
        Self { hint: Some(hint.to_string()), ..self }
    }
}
