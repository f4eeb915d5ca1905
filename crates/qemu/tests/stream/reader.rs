//! A second reader of the migration stream, which shares nothing with the product: recursive descent over the whole
//! stream in memory, blocks by name, and a panic wherever the stream isn't what it should be.

/// A whole stream, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Everything but the PART sections and the page records: preamble, block list, frame of END, devices.
    pub(crate) frame: Vec<u8>,
    pub(crate) blocks: Vec<(String, u64)>,
    pub(crate) pages: Vec<Page>,
    /// How many page records each PART section has.
    pub(crate) parts: Vec<usize>,
    /// What kind of thing came, in order, before the device sections; a row of PARTs once.
    pub(crate) outline: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) block: String,
    pub(crate) offset: u64,
    pub(crate) content: Vec<u8>,
    pub(crate) last: bool,
}

impl Stream {
    /// What each block holds in the end; pages that never came are zero.
    pub(crate) fn memory(&self, block: &str) -> Vec<u8> {
        let bytes = self.blocks.iter().find(|(name, _)| name == block).unwrap().1;
        let mut memory = vec![0; bytes as usize];
        for page in self.pages.iter().filter(|page| page.block == block) {
            memory[page.offset as usize..][..4096].copy_from_slice(&page.content);
        }
        memory
    }
}

pub(crate) fn read(wire: &[u8]) -> Stream {
    let mut stream = Stream { frame: vec![], blocks: vec![], pages: vec![], parts: vec![], outline: vec![] };
    let mut rest = wire;
    let preamble = eat(&mut rest, 8);
    assert_eq!(preamble, b"QEVM\0\0\0\x03");
    stream.frame.extend(preamble);
    let mut block = String::new();
    while sections(&mut rest, &mut stream, &mut block) {}
    stream.frame.extend(rest);
    stream
}

/// One section; false after the END of RAM.
fn sections(rest: &mut &[u8], stream: &mut Stream, block: &mut String) -> bool {
    let before = *rest;
    let kind = eat(rest, 1)[0];
    let outline = match kind {
        5 => subsection(rest),
        7 => configuration(rest),
        8 => format!("command {}", command(rest)),
        1 => ram_start(rest, stream),
        2 => "PART".to_owned(),
        3 => "END".to_owned(),
        other => panic!("section type {other}"),
    };
    if stream.outline.last() != Some(&outline) || kind != 2 {
        stream.outline.push(outline);
    }
    if kind != 2 && kind != 3 {
        stream.frame.extend(&before[..before.len() - rest.len()]);
        return true;
    }
    let id = eat(rest, 4);
    let pages = stream.pages.len();
    while record(rest, stream, block, kind == 3) {}
    footer(rest, id);
    match kind {
        2 => stream.parts.push(stream.pages.len() - pages),
        _ => stream.frame.extend([&[3][..], id, &16u64.to_be_bytes(), &[0x7e], id].concat()),
    }
    kind == 2
}

fn configuration(rest: &mut &[u8]) -> String {
    let length = number(eat(rest, 4));
    let machine = String::from_utf8(eat(rest, length as usize).to_vec()).unwrap();
    format!("configuration {machine}")
}

fn subsection(rest: &mut &[u8]) -> String {
    let name = name(rest);
    assert_eq!(name, "configuration/uuid");
    eat(rest, 4 + 16);
    name
}

fn command(rest: &mut &[u8]) -> u64 {
    let kind = number(eat(rest, 2));
    let length = number(eat(rest, 2));
    eat(rest, length as usize);
    kind
}

fn ram_start(rest: &mut &[u8], stream: &mut Stream) -> String {
    let id = eat(rest, 4);
    assert_eq!(name(rest), "ram");
    assert_eq!(eat(rest, 8), [0, 0, 0, 0, 0, 0, 0, 4]);
    let head = number(eat(rest, 8));
    assert_eq!(head % 4096, 4, "the block list comes first");
    let mut total = head - 4;
    while total > 0 {
        let name = name(rest);
        let bytes = number(eat(rest, 8));
        total -= bytes;
        stream.blocks.push((name, bytes));
    }
    assert_eq!(number(eat(rest, 8)), 16, "nothing else at the start");
    footer(rest, id);
    "START ram".to_owned()
}

fn record(rest: &mut &[u8], stream: &mut Stream, block: &mut String, last: bool) -> bool {
    let word = number(eat(rest, 8));
    if word == 16 {
        return false;
    }
    let flags = word % 4096;
    if flags & 32 == 0 {
        *block = name(rest);
    }
    let content = match flags & !32 {
        8 => eat(rest, 4096).to_vec(),
        2 => vec![eat(rest, 1)[0]; 4096],
        other => panic!("record flags {other:#x}"),
    };
    stream.pages.push(Page { block: block.clone(), offset: word - flags, content, last });
    true
}

fn footer(rest: &mut &[u8], id: &[u8]) {
    assert_eq!(eat(rest, 1), [0x7e]);
    assert_eq!(eat(rest, 4), id);
}

fn eat<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (eaten, left) = rest.split_at(count);
    *rest = left;
    eaten
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn name(rest: &mut &[u8]) -> String {
    let length = eat(rest, 1)[0];
    String::from_utf8(eat(rest, length.into()).to_vec()).unwrap()
}
