//! The end of the device sections, as far as it can be told: by the machine's description, which comes last.

/// The end mark of the sections, and the type of what follows: the description's length (be32) and its JSON.
const HEAD: [u8; 2] = [0x00, 0x06];
/// With the length and the brace that opens the JSON.
const HEAD_BYTES: usize = HEAD.len() + 4 + 1;

/// Finds the machine's description among the device sections as they pass, and tells when the whole of it has come.
///
/// What a guest put into its devices' state may look like one and say that the stream is over where it isn't. It comes
/// earlier than the real one, which has no such mark within; so of several the last counts, and only a stream that still
/// goes on can be misjudged. Who acts on the answer has to bear that.
///
/// ```
/// let mut description = godwit_qemu::stream::Description::default();
/// description.push(b"devices\x00\x06\0\0\0\x0f{\"devices\":");
/// assert!(!description.is_complete());
/// description.push(b"[]}");
/// assert!(!description.is_complete());
/// description.push(b"}");
/// assert!(description.is_complete());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Description {
    /// The newest bytes, fewer than a head has.
    newest: Vec<u8>,
    pushed_bytes: u64,
    /// Where the description ends that was announced last, in bytes from the beginning.
    end: Option<u64>,
}

impl Description {
    /// Looks at the next bytes of the device sections.
    pub fn push(&mut self, bytes: &[u8]) {
        let first = self.pushed_bytes - self.newest.len() as u64;
        self.newest.extend_from_slice(bytes);
        self.pushed_bytes += bytes.len() as u64;
        for (at, head) in self.newest.windows(HEAD_BYTES).enumerate() {
            if let [0x00, 0x06, a, b, c, d, b'{'] = *head {
                let length = u64::from(u32::from_be_bytes([a, b, c, d]));
                self.end = Some(first + at as u64 + HEAD_BYTES as u64 - 1 + length);
            }
        }
        let known = self.newest.len().saturating_sub(HEAD_BYTES - 1);
        self.newest.drain(..known);
    }

    /// Whether what has come ends with a description.
    pub fn is_complete(&self) -> bool {
        self.end == Some(self.pushed_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn described(devices: &[u8], json: &[u8]) -> Vec<u8> {
        let length = u32::try_from(json.len()).unwrap().to_be_bytes();
        [devices, &HEAD, &length, json].concat()
    }

    proptest! {
        #[test]
        fn a_description_is_found_however_the_stream_is_cut_and_whatever_devices_hold(
            devices in proptest::collection::vec(prop_oneof![Just(0), Just(6), Just(b'{'), any::<u8>()], 0..200),
            text in "[ -~]{0,80}",
            cut in 1..40_usize,
        ) {
            let stream = described(&devices, format!("{{{text}}}").as_bytes());
            let mut description = Description::default();
            stream.chunks(cut).for_each(|chunk| description.push(chunk));
            prop_assert!(description.is_complete());
            description.push(b"more");
            prop_assert!(!description.is_complete());
        }
    }

    #[test]
    fn one_that_a_guest_wrote_ends_nothing_once_the_stream_goes_on() {
        let mut description = Description::default();
        description.push(&described(b"ring", b"{}"));
        assert!(description.is_complete());
        let real = described(b"more", b"{\"devices\":[]}");
        description.push(&real[..real.len() - 1]);
        assert!(!description.is_complete());
        description.push(&real[real.len() - 1..]);
        assert!(description.is_complete());
    }
}
