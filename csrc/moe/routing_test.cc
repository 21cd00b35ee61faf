#include "moe/routing.h"

#include <stdexcept>
#include <string>

#include "testing.h"

namespace kt {
namespace {

TEST(RowsAreSortedByExpertAndKeepTokenOrder) {
  const std::vector<int64_t> experts = {2, 0, 0, 2, 3, 1};  // three tokens, two slots; 3 is the sentinel
  const std::vector<float> weights = {0.1F, 0.2F, 0.3F, 0.4F, 0.5F, 0.6F};
  const Routing routing = SortByExpert(experts.data(), weights.data(), 3, 2, 3);
  CHECK(routing.rows() == 5);
  CHECK((routing.token_of == std::vector<int64_t>{0, 1, 2, 0, 1}));
  CHECK((routing.weight_of == std::vector<float>{0.2F, 0.3F, 0.6F, 0.1F, 0.4F}));
  CHECK((routing.place_of == std::vector<int64_t>{3, 0, 1, 4, -1, 2}));
  CHECK(routing.blocks.size() == 3);
  CHECK(routing.blocks[2].expert == 2 && routing.blocks[2].first == 3 && routing.blocks[2].rows == 2);
}

TEST(LongRunsAreCutIntoBlocks) {
  const int64_t tokens = 3 * Routing::kBlockRows + 1;
  const std::vector<int64_t> experts(static_cast<size_t>(tokens), 1);
  const std::vector<float> weights(static_cast<size_t>(tokens), 1.0F);
  const Routing routing = SortByExpert(experts.data(), weights.data(), tokens, 1, 2);
  CHECK(routing.blocks.size() == 4);
  int64_t next = 0;
  for (const RowBlock& block : routing.blocks) {
    CHECK(block.expert == 1 && block.first == next);
    next += block.rows;
  }
  CHECK(next == tokens);
}

TEST(NothingRoutedGivesNoBlocks) {
  const std::vector<int64_t> sentinel = {4, 4};
  const std::vector<float> weights = {1.0F, 1.0F};
  CHECK(SortByExpert(sentinel.data(), weights.data(), 1, 2, 4).blocks.empty());
  CHECK(SortByExpert(nullptr, nullptr, 0, 2, 4).blocks.empty());
}

TEST(BlocksBelongToTheirExpertsNode) {
  // Expert 1 has two blocks, 0, 3 and 4 one each, 2 none.
  std::vector<int64_t> experts = {0, 3, 4};
  experts.insert(experts.end(), static_cast<size_t>(Routing::kBlockRows) + 1, 1);
  const std::vector<float> weights(experts.size(), 1.0F);
  const Routing routing = SortByExpert(experts.data(), weights.data(), static_cast<int64_t>(experts.size()), 1, 5);
  CHECK(routing.blocks.size() == 5);
  CHECK(BlocksOfNodes(routing, 5, 1) == std::vector<int64_t>{5});
  CHECK(BlocksOfNodes(routing, 5, 2) == (std::vector<int64_t>{3, 5}));           // experts 0-2 and 3-4
  CHECK(BlocksOfNodes(routing, 5, 3) == (std::vector<int64_t>{3, 4, 5}));        // 0-1, 2-3, 4
  CHECK(BlocksOfNodes(routing, 5, 5) == (std::vector<int64_t>{1, 3, 3, 4, 5}));  // nothing for expert 2
  CHECK(BlocksOfNodes(routing, 5, 7).back() == 5);                               // more nodes than experts
  CHECK(BlocksOfNodes(Routing(), 5, 2) == (std::vector<int64_t>{0, 0}));
}

TEST(IndicesOutOfRangeAreRefused) {
  const float weight = 1.0F;
  for (const int64_t bad : {int64_t{-1}, int64_t{5}}) {
    CHECK_THROWS(SortByExpert(&bad, &weight, 1, 1, 4), std::out_of_range);
  }
}

std::string RefusalOf(const std::vector<int64_t>& experts) {
  try {
    CountRows(experts.data(), static_cast<int64_t>(experts.size()), 4);
  } catch (const std::out_of_range& error) {
    return error.what();
  }
  return "";
}

TEST(ARefusalNamesTheSmallestIndexBelowZeroElseTheLargest) {
  const auto refusal = [](const std::string& index) {
    return "kt_sft: top_k_index holds " + index + "; valid are 0 to 3, and 4 for no expert";
  };
  CHECK(RefusalOf({0, 4, 3}).empty());
  CHECK(RefusalOf({0, 5, 4}) == refusal("5"));
  CHECK(RefusalOf({7, 1, 5, 9, 2}) == refusal("9"));
  CHECK(RefusalOf({7, -1, 2, -3, 0}) == refusal("-3"));
}

}  // namespace
}  // namespace kt
