//! Writes `spec/vectors/*.json` and the worked session of `spec/PROTOCOL.md`: `cargo run -p connect-crypto --example vectors`.
//!
//! All randomness follows from labels, so that the files change only when the protocol does;
//! `tests/vectors.rs` fails when they differ from what this program would write.

#[path = "../../tests/common/mod.rs"]
mod common;
mod generate;

fn main() -> std::io::Result<()> {
    for (name, text) in generate::files() {
        std::fs::write(generate::directory().join(name), text)?;
    }
    let document = std::fs::read_to_string(generate::document())?;
    std::fs::write(generate::document(), generate::with_session(&document))
}
