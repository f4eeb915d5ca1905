//! QMP without I/O: bytes in, messages out.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The longest line that is accepted; `query-qmp-schema`, the longest answer known, has 250 KiB.
pub const LINE_BYTES_MAX: usize = 8 << 20;

/// What a monitor says.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first message: commands may follow after `qmp_capabilities`.
    Greeting,
    /// A command was executed.
    Return {
        /// The number of the command.
        id: u64,
        /// What it returned.
        value: Value,
    },
    /// A command was refused.
    Error {
        /// The number of the command; absent if QEMU couldn't read it.
        id: Option<u64>,
        /// `GenericError`, `CommandNotFound`, ...
        class: String,
        /// For people.
        description: String,
    },
    /// Something happened.
    Event(Event),
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, ...
    #[serde(rename = "event")]
    pub name: String,
    /// What belongs to it; an empty object if nothing does.
    #[serde(default)]
    pub data: Map<String, Value>,
    /// When, by the clock of QEMU's host.
    #[serde(default)]
    pub timestamp: Timestamp,
}

/// QEMU's own time of an event: the host's wall clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    /// Since the Unix epoch; negative if QEMU couldn't read its clock.
    pub seconds: i64,
    /// Of the second.
    pub microseconds: i64,
}

impl Timestamp {
    /// Microseconds since the Unix epoch; 0 if QEMU couldn't read its clock.
    pub fn unix_us(self) -> u64 {
        let us = self.seconds.checked_mul(1_000_000).and_then(|us| us.checked_add(self.microseconds));
        us.and_then(|us| u64::try_from(us).ok()).unwrap_or(0)
    }
}

/// Bytes that aren't QMP. Nothing can be read after this.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// No end of line in sight.
    #[error("the monitor sent a line of more than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// Not JSON, or a message without its parts.
    #[error("the monitor sent something that isn't QMP")]
    NotQmp(#[source] serde_json::Error),
}

/// Collects bytes and gives messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Up to here there is no end of line in `buffer`.
    searched: usize,
}

impl Decoder {
    /// Takes bytes as they came. Call [`Self::next_message`] until it gives `None` before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message; `None` if more bytes are needed. Messages of unknown kinds are skipped.
    ///
    /// # Errors
    /// See [`CodecError`].
    pub fn next_message(&mut self) -> Result<Option<Message>, CodecError> {
        while let Some(line) = self.next_line()? {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let wire: Wire = serde_json::from_slice(&line).map_err(CodecError::NotQmp)?;
            if let Some(message) = wire.into_message() {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    fn next_line(&mut self) -> Result<Option<Vec<u8>>, CodecError> {
        let unsearched = &self.buffer[self.searched..];
        let Some(position) = unsearched.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buffer.len();
            return if self.searched > LINE_BYTES_MAX { Err(CodecError::LineTooLong) } else { Ok(None) };
        };
        let rest = self.buffer.split_off(self.searched + position + 1);
        self.searched = 0;
        Ok(Some(std::mem::replace(&mut self.buffer, rest)))
    }
}

/// The union of all messages as they are on the wire.
#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "QMP")]
    greeting: Option<serde::de::IgnoredAny>,
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<WireError>,
    event: Option<String>,
    #[serde(default)]
    data: Map<String, Value>,
    #[serde(default)]
    timestamp: Timestamp,
}

#[derive(Deserialize)]
struct WireError {
    class: String,
    #[serde(rename = "desc")]
    description: String,
}

impl Wire {
    fn into_message(self) -> Option<Message> {
        if let Some(WireError { class, description }) = self.error {
            return Some(Message::Error { id: self.id, class, description });
        }
        if let Some(name) = self.event {
            return Some(Message::Event(Event { name, data: self.data, timestamp: self.timestamp }));
        }
        if self.greeting.is_some() {
            return Some(Message::Greeting);
        }
        self.id.map(|id| Message::Return { id, value: self.value.unwrap_or_default() })
    }
}

/// A command as one line.
pub fn encode(id: u64, command: &str, arguments: &Value) -> Vec<u8> {
    let mut message = serde_json::json!({ "execute": command, "id": id });
    if !arguments.is_null() {
        message["arguments"] = arguments.clone();
    }
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const CONVERSATION: &str = concat!(
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}"#,
        "\r\n",
        r#"{"return": {}, "id": 0}"#,
        "\r\n",
        r#"{"timestamp": {"seconds": 7, "microseconds": 5}, "event": "STOP"}"#,
        "\r\n\r\n",
        r#"{"from": "the future"}"#,
        "\r\n",
        r#"{"id": 1, "error": {"class": "GenericError", "desc": "no"}}"#,
        "\r\n",
        r#"{"return": null, "id": 2}"#,
        "\n",
        r#"{"return": [1, "\n"], "id": 3, "more": 1}"#,
        "\n"
    );

    fn messages(decoder: &mut Decoder) -> Vec<Message> {
        std::iter::from_fn(|| decoder.next_message().unwrap()).collect()
    }

    fn expected() -> Vec<Message> {
        let stop = Event {
            name: "STOP".into(),
            data: Map::new(),
            timestamp: Timestamp { seconds: 7, microseconds: 5 },
        };
        vec![
            Message::Greeting,
            Message::Return { id: 0, value: json!({}) },
            Message::Event(stop),
            Message::Error { id: Some(1), class: "GenericError".into(), description: "no".into() },
            Message::Return { id: 2, value: Value::Null },
            Message::Return { id: 3, value: json!([1, "\n"]) },
        ]
    }

    proptest! {
        #[test]
        fn cuts_between_bytes_change_nothing(cuts in proptest::collection::vec(0..CONVERSATION.len(), 0..20)) {
            let mut cuts = cuts;
            cuts.extend([0, CONVERSATION.len()]);
            cuts.sort_unstable();
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for pair in cuts.windows(2) {
                decoder.push(&CONVERSATION.as_bytes()[pair[0]..pair[1]]);
                got.extend(messages(&mut decoder));
            }
            prop_assert_eq!(got, expected());
        }

        #[test]
        fn any_bytes_end_in_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_message() {}
        }
    }

    #[test]
    fn lines_are_bounded() {
        let mut decoder = Decoder::default();
        decoder.push(&vec![b' '; LINE_BYTES_MAX]);
        assert!(matches!(decoder.next_message(), Ok(None)));
        decoder.push(b" ");
        assert!(matches!(decoder.next_message(), Err(CodecError::LineTooLong)));
    }

    #[test]
    fn a_command_is_one_line() {
        let line = encode(7, "migrate", &json!({"uri": "unix:/a\nb"}));
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        let back: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(back, json!({"execute": "migrate", "id": 7, "arguments": {"uri": "unix:/a\nb"}}));
        assert!(!String::from_utf8(encode(7, "stop", &Value::Null)).unwrap().contains("arguments"));
    }
}
