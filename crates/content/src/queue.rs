//! Queues over slot numbers: every slot is in exactly one of them, and each operation takes constant time.

/// Which queue a slot is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    /// Slots that hold nothing.
    Free,
    /// Blocks that are unlikely to be sent again.
    Cold,
    /// Blocks that are likely to be sent again.
    Hot,
}

/// Three queues threaded through one array of links.
pub(crate) struct Queues {
    links: Vec<Link>,
    ends: [Ends; 3],
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
    queue: Queue,
}

#[derive(Clone, Copy)]
struct Ends {
    front: u32,
    back: u32,
}

const NONE: u32 = u32::MAX;

impl Queues {
    pub(crate) const BYTES_PER_SLOT: usize = size_of::<Link>();

    /// All of `slots` slots, in order, in [`Queue::Free`].
    pub(crate) fn new(slots: usize) -> Self {
        let empty = Ends { front: NONE, back: NONE };
        let mut queues = Self { links: Vec::with_capacity(slots), ends: [empty; 3] };
        for slot in 0..slots as u32 {
            queues.links.push(Link { previous: NONE, next: NONE, queue: Queue::Free });
            queues.append(slot, Queue::Free);
        }
        queues
    }

    /// The slot that has waited longest in `queue`.
    pub(crate) fn front(&self, queue: Queue) -> Option<u32> {
        let front = self.ends[queue as usize].front;
        (front != NONE).then_some(front)
    }

    /// Moves a slot to the back of `queue`.
    pub(crate) fn move_to_back(&mut self, slot: u32, queue: Queue) {
        self.detach(slot);
        self.append(slot, queue);
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.links.capacity() * size_of::<Link>()
    }

    /// Which queue a slot is in.
    pub(crate) fn queue_of(&self, slot: u32) -> Queue {
        self.links[slot as usize].queue
    }

    fn append(&mut self, slot: u32, queue: Queue) {
        let back = self.ends[queue as usize].back;
        self.links[slot as usize] = Link { previous: back, next: NONE, queue };
        self.ends[queue as usize].back = slot;
        match back {
            NONE => self.ends[queue as usize].front = slot,
            back => self.links[back as usize].next = slot,
        }
    }

    fn detach(&mut self, slot: u32) {
        let Link { previous, next, queue } = self.links[slot as usize];
        match previous {
            NONE => self.ends[queue as usize].front = next,
            previous => self.links[previous as usize].next = next,
        }
        match next {
            NONE => self.ends[queue as usize].back = previous,
            next => self.links[next as usize].previous = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const QUEUES: [Queue; 3] = [Queue::Free, Queue::Cold, Queue::Hot];

    proptest! {
        #[test]
        fn queues_behave_like_three_deques(moves in prop::collection::vec((0u32..6, 0usize..3), 0..100)) {
            let mut queues = Queues::new(6);
            let mut model = [(0..6).collect::<VecDeque<u32>>(), VecDeque::new(), VecDeque::new()];
            for (slot, to) in moves {
                queues.move_to_back(slot, QUEUES[to]);
                model.iter_mut().for_each(|deque| deque.retain(|other| *other != slot));
                model[to].push_back(slot);
                prop_assert_eq!(queues.queue_of(slot), QUEUES[to]);
                for queue in QUEUES {
                    prop_assert_eq!(queues.front(queue), model[queue as usize].front().copied());
                }
            }
        }
    }
}
